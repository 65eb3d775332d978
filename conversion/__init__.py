"""From anyone's weights to ours, and back."""

if __name__ == "conversion":  # found through the current folder: every class would exist twice
    raise ImportError("import vit_adapter.conversion instead of conversion")
