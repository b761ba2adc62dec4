// All ops of the CPU backend, which register.cpp binds. Contracts: fastvdm/ops/<stem>.py.
#pragma once

#include <functional>

#include "common/torch.h"

namespace fastvdm {

// pack(), the weight in one of a kernel's forms. It is kept from the second consecutive call that
// finds the same content, and as long as the content stays the same.
Tensor packed_weights(const Tensor& weight, int64_t form, const std::function<Tensor()>& pack);
int64_t set_packed_weights_limit(int64_t bytes);  // 0: off. Returns the previous limit
// Bytes kept, entries kept, weights known, calls served.
std::tuple<int64_t, int64_t, int64_t, int64_t> packed_weights_state();

// The limit of free memory that is kept; 0: off. Returns the previous limit.
int64_t set_output_pool_limit(int64_t bytes);
int64_t output_pool_bytes();

std::tuple<Tensor, Tensor, Tensor> norm_act_fwd(Tensor x, OptTensor x2, OptTensor x_bias,
                                                Tensor weight, OptTensor bias, OptTensor scale,
                                                OptTensor shift, OptTensor residual,
                                                OptTensor dropout_mask, OptTensor mean,
                                                OptTensor rstd, int64_t kind, int64_t groups,
                                                bool per_frame, double eps, bool act);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_bwd(
    Tensor dy, Tensor x, OptTensor x2, OptTensor x_bias, Tensor weight, OptTensor bias,
    OptTensor scale, OptTensor shift, OptTensor dropout_mask, OptTensor mean, OptTensor rstd,
    int64_t kind, int64_t groups, bool per_frame, double eps, bool act, bool need_dx,
    bool need_dx_bias, bool need_dweight, bool need_dfilm);

std::tuple<Tensor, Tensor> axis_attention_fwd(Tensor qkv, int64_t axis, OptTensor bias,
                                              OptTensor rel_k, OptTensor rel_v, OptTensor rotary,
                                              OptTensor focus_mask, int64_t num_images,
                                              double sm_scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> axis_attention_bwd(
    Tensor dout, Tensor qkv, Tensor out, Tensor lse, int64_t axis, OptTensor bias, OptTensor rel_k,
    OptTensor rel_v, OptTensor rotary, OptTensor focus_mask, int64_t num_images, double sm_scale,
    bool need_dqkv, bool need_dbias, bool need_drel_k, bool need_drel_v);

Tensor temporal_block_fwd(Tensor x, Tensor norm_weight, OptTensor norm_bias, Tensor qkv_weight,
                          OptTensor qkv_bias, Tensor out_weight, OptTensor out_bias, int64_t heads,
                          double eps, OptTensor bias, OptTensor rel_k, OptTensor rel_v,
                          OptTensor rotary, OptTensor focus_mask, int64_t num_images);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
temporal_block_bwd(Tensor dy, Tensor x, Tensor norm_weight, OptTensor norm_bias, Tensor qkv_weight,
                   OptTensor qkv_bias, Tensor out_weight, OptTensor out_bias, int64_t heads,
                   double eps, OptTensor bias, OptTensor rel_k, OptTensor rel_v, OptTensor rotary,
                   OptTensor focus_mask, int64_t num_images, bool need_norm, bool need_qkv,
                   bool need_out, bool need_bias, bool need_rel);

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(Tensor qkv, double sm_scale);
Tensor linear_attention_bwd(Tensor dout, Tensor qkv, Tensor k_lse, Tensor ctx, double sm_scale);

std::tuple<Tensor, Tensor, Tensor> linear_attention_block_fwd(Tensor x, Tensor norm_weight,
                                                              OptTensor norm_bias,
                                                              Tensor qkv_weight, Tensor out_weight,
                                                              OptTensor out_bias, int64_t heads,
                                                              double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_block_bwd(
    Tensor dy, Tensor x, Tensor norm_weight, OptTensor norm_bias, Tensor qkv_weight,
    Tensor out_weight, OptTensor out_bias, Tensor g, Tensor lse, int64_t heads, double eps,
    bool need_norm, bool need_qkv, bool need_out);

std::tuple<Tensor, Tensor> guidance_seed_fwd(Tensor z, Tensor model_out, Tensor coef,
                                             OptTensor known, OptTensor slot, OptTensor low_res,
                                             OptTensor low_slot, OptTensor extra, bool clip);
std::tuple<Tensor, Tensor> guidance_update_fwd(Tensor z, Tensor estimate, Tensor coef,
                                               OptTensor grad, OptTensor seed, OptTensor known,
                                               OptTensor slot, OptTensor noise, OptTensor rng,
                                               OptTensor threshold, int64_t step, bool clip,
                                               bool want_x);

Tensor space_conv_fwd(Tensor x, OptTensor x2, Tensor weight, OptTensor bias, OptTensor residual,
                      int64_t stride);
Tensor space_conv_dx(Tensor dy, Tensor weight);
Tensor conv3x3(Tensor x, OptTensor x2, Tensor weight, OptTensor bias, OptTensor residual,
               bool turned, int64_t tile);
Tensor direct_conv(Tensor x, OptTensor x2, Tensor weight, OptTensor bias, OptTensor residual,
                   int64_t stride);
Tensor direct_conv_transpose(Tensor x, Tensor weight, OptTensor bias, OptTensor residual);
Tensor space_conv_dw(Tensor dy, Tensor x, OptTensor x2, Tensor weight);
Tensor conv3x3_dw(Tensor dy, Tensor x, OptTensor x2, Tensor weight, int64_t tile);
Tensor linear_fwd(Tensor x, Tensor weight, OptTensor bias);
Tensor linear_dx(Tensor dy, Tensor weight);

}  // namespace fastvdm
