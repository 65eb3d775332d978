"""What a model is: configuration classes and the published presets."""

if __name__ == "configuration":  # found through the current folder: every class would exist twice
    raise ImportError("import vit_adapter.configuration instead of configuration")
