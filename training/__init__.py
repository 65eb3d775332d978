"""Training, evaluation and drawing."""

if __name__ == "training":  # found through the current folder: every class would exist twice
    raise ImportError("import vit_adapter.training instead of training")
