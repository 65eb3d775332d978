// The operators' names and arguments. See kernels/ms_deform_attn.py for what they mean.
#include <torch/library.h>

TORCH_LIBRARY(vit_adapter, library) {
  library.def(
      "ms_deform_attn(Tensor value, Tensor offsets, Tensor logits, SymInt[] source_grids, SymInt[] query_grids, "
      "int points) -> Tensor");
  library.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor offsets, Tensor logits, "
      "SymInt[] source_grids, SymInt[] query_grids, int points) -> (Tensor, Tensor, Tensor)");
  library.def(
      "ms_deform_attn_sample(Tensor value, Tensor locations, Tensor weights, SymInt[] source_grids) -> Tensor");
  library.def(
      "ms_deform_attn_sample_backward(Tensor grad_output, Tensor value, Tensor locations, Tensor weights, "
      "SymInt[] source_grids) -> (Tensor, Tensor, Tensor)");
}
