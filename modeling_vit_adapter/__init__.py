"""What a model computes: the adapter backbone, the detector and its image processor."""

if __name__ == "modeling_vit_adapter":  # found through the current folder: every class would exist twice
    raise ImportError("import vit_adapter.modeling_vit_adapter instead of modeling_vit_adapter")
