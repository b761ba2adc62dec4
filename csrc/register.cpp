// The private launchers of the C++ backend, named as in kernels/ with the device as suffix. The
// public ops, their fakes and their autograd are in fastvdm/ops.
#include "cpu/launchers.h"

STABLE_TORCH_LIBRARY(fastvdm_C, m) {
  m.def("set_cpu_isa(str name) -> str");
  m.def("cpu_isa() -> str");
  m.def("cpu_has_native(bool bf16) -> bool");
  m.def("set_packed_weights_limit(int bytes) -> int");
  m.def("packed_weights_state() -> (int, int, int, int)");
  m.def("set_output_pool_limit(int bytes) -> int");
  m.def("output_pool_bytes() -> int");
  m.def("linear_fwd_cpu(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_dx_cpu(Tensor dy, Tensor weight) -> Tensor");
  m.def(
      "norm_act_fwd_cpu(Tensor x, Tensor? x2, Tensor? x_bias, Tensor weight, Tensor? bias, "
      "Tensor? scale, Tensor? shift, Tensor? residual, Tensor? dropout_mask, Tensor? mean, "
      "Tensor? rstd, int kind, int groups, bool per_frame, float eps, bool act) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_act_bwd_cpu(Tensor dy, Tensor x, Tensor? x2, Tensor? x_bias, Tensor weight, "
      "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? dropout_mask, Tensor? mean, "
      "Tensor? rstd, int kind, int groups, bool per_frame, float eps, bool act, bool need_dx, "
      "bool need_dx_bias, bool need_dweight, bool need_dfilm) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "axis_attention_fwd_cpu(Tensor qkv, int axis, Tensor? bias, Tensor? rel_k, Tensor? rel_v, "
      "Tensor? rotary, Tensor? focus_mask, int num_images, float sm_scale) -> (Tensor, Tensor)");
  m.def(
      "axis_attention_bwd_cpu(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int axis, "
      "Tensor? bias, Tensor? rel_k, Tensor? rel_v, Tensor? rotary, Tensor? focus_mask, "
      "int num_images, float sm_scale, bool need_dqkv, bool need_dbias, bool need_drel_k, "
      "bool need_drel_v) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "temporal_block_fwd_cpu(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qkv_weight, "
      "Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, int heads, float eps, Tensor? bias, "
      "Tensor? rel_k, Tensor? rel_v, Tensor? rotary, Tensor? focus_mask, int num_images) "
      "-> Tensor");
  m.def(
      "temporal_block_bwd_cpu(Tensor dy, Tensor x, Tensor norm_weight, Tensor? norm_bias, "
      "Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, int heads, "
      "float eps, Tensor? bias, Tensor? rel_k, Tensor? rel_v, Tensor? rotary, Tensor? focus_mask, "
      "int num_images, bool need_norm, bool need_qkv, bool need_out, bool need_bias, "
      "bool need_rel) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("linear_attention_fwd_cpu(Tensor qkv, float sm_scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_bwd_cpu(Tensor dout, Tensor qkv, Tensor k_lse, Tensor ctx, "
      "float sm_scale) -> Tensor");
  m.def(
      "linear_attention_block_fwd_cpu(Tensor x, Tensor norm_weight, Tensor? norm_bias, "
      "Tensor qkv_weight, Tensor out_weight, Tensor? out_bias, int heads, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_block_bwd_cpu(Tensor dy, Tensor x, Tensor norm_weight, Tensor? norm_bias, "
      "Tensor qkv_weight, Tensor out_weight, Tensor? out_bias, Tensor g, Tensor lse, int heads, "
      "float eps, bool need_norm, bool need_qkv, bool need_out) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "guidance_seed_fwd_cpu(Tensor z, Tensor model_out, Tensor coef, Tensor? known, "
      "Tensor? slot, Tensor? low_res, Tensor? low_slot, Tensor? extra, bool clip) "
      "-> (Tensor, Tensor)");
  m.def(
      "guidance_update_fwd_cpu(Tensor z, Tensor estimate, Tensor coef, Tensor? grad, "
      "Tensor? seed, Tensor? known, Tensor? slot, Tensor? noise, Tensor? rng, "
      "Tensor? threshold, int step, bool clip, bool want_x) -> (Tensor, Tensor)");
  m.def(
      "space_conv_fwd_cpu(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? residual, "
      "int stride) -> Tensor");
  m.def("space_conv_dx_cpu(Tensor dy, Tensor weight) -> Tensor");
  m.def(
      "conv3x3_cpu(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? residual, "
      "bool turned, int tile) -> Tensor");
  m.def(
      "space_conv_transpose_fwd_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) "
      "-> Tensor");
  m.def("space_conv_dw_cpu(Tensor dy, Tensor x, Tensor? x2, Tensor weight) -> Tensor");
  m.def("conv3x3_dw_cpu(Tensor dy, Tensor x, Tensor? x2, Tensor weight, int tile) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastvdm_C, CompositeExplicitAutograd, m) {
  m.impl("set_cpu_isa", TORCH_BOX(&fastvdm::set_cpu_isa));
  m.impl("cpu_isa", TORCH_BOX(&fastvdm::cpu_isa));
  m.impl("cpu_has_native", TORCH_BOX(&fastvdm::cpu_has_native));
  m.impl("set_packed_weights_limit", TORCH_BOX(&fastvdm::set_packed_weights_limit));
  m.impl("packed_weights_state", TORCH_BOX(&fastvdm::packed_weights_state));
  m.impl("set_output_pool_limit", TORCH_BOX(&fastvdm::set_output_pool_limit));
  m.impl("output_pool_bytes", TORCH_BOX(&fastvdm::output_pool_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(fastvdm_C, CPU, m) {
  m.impl("norm_act_fwd_cpu", TORCH_BOX(&fastvdm::norm_act_fwd));
  m.impl("norm_act_bwd_cpu", TORCH_BOX(&fastvdm::norm_act_bwd));
  m.impl("axis_attention_fwd_cpu", TORCH_BOX(&fastvdm::axis_attention_fwd));
  m.impl("axis_attention_bwd_cpu", TORCH_BOX(&fastvdm::axis_attention_bwd));
  m.impl("temporal_block_fwd_cpu", TORCH_BOX(&fastvdm::temporal_block_fwd));
  m.impl("temporal_block_bwd_cpu", TORCH_BOX(&fastvdm::temporal_block_bwd));
  m.impl("linear_attention_fwd_cpu", TORCH_BOX(&fastvdm::linear_attention_fwd));
  m.impl("linear_attention_bwd_cpu", TORCH_BOX(&fastvdm::linear_attention_bwd));
  m.impl("linear_attention_block_fwd_cpu", TORCH_BOX(&fastvdm::linear_attention_block_fwd));
  m.impl("linear_attention_block_bwd_cpu", TORCH_BOX(&fastvdm::linear_attention_block_bwd));
  m.impl("guidance_seed_fwd_cpu", TORCH_BOX(&fastvdm::guidance_seed_fwd));
  m.impl("guidance_update_fwd_cpu", TORCH_BOX(&fastvdm::guidance_update_fwd));
  m.impl("space_conv_fwd_cpu", TORCH_BOX(&fastvdm::space_conv_fwd));
  m.impl("space_conv_dx_cpu", TORCH_BOX(&fastvdm::space_conv_dx));
  m.impl("conv3x3_cpu", TORCH_BOX(&fastvdm::conv3x3));
  m.impl("space_conv_transpose_fwd_cpu", TORCH_BOX(&fastvdm::direct_conv_transpose));
  m.impl("space_conv_dw_cpu", TORCH_BOX(&fastvdm::space_conv_dw));
  m.impl("conv3x3_dw_cpu", TORCH_BOX(&fastvdm::conv3x3_dw));
  m.impl("linear_fwd_cpu", TORCH_BOX(&fastvdm::linear_fwd));
  m.impl("linear_dx_cpu", TORCH_BOX(&fastvdm::linear_dx));
}
