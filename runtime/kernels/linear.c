/* The operator flrc.Linear: all projections of one input, each a sum of parts, and what comes before them in a decoder.
 *
 * Inputs:
 *   0 x          float [..., columns], the axis before it positions
 *   1 residual   float like x
 *   2 gate       float like x
 *   3 post_norm  constant float [columns]
 *   4 norm       constant float [columns]
 *   5 bias       constant float [sum of rows], all projections one behind another
 *   6 start      int64 [1]: only positions from it on are computed; a negative one is counted from the end
 *   7 ...        constant uint8, at multiples of 64 bytes: the tiles (flrc_product.h) of every plane
 * All but x and tiles are optional. What is multiplied is, in this order: x; with gate, act(gate) * x; with post_norm,
 * rms_norm of that times its weights; with residual, that + residual: the sum; with norm, rms_norm of that times its
 * weights. A value that is not finite is an error.
 * Outputs: one a projection, [..., rows] float; behind them, if there is a residual, the sum, [..., columns].
 * Attributes:
 *   columns of x: inputs of every projection
 *   rows    of every projection
 *   parts   six numbers a part: its projection; the width of its plane, or of V; of U, or 0 for a plane of the matrix
 *           itself; the ranks V and U hold; those that this stage reads (a multiple of 32, the first ones); 1 if pivoted
 *   scales  the float of every plane, V before U; of a plane of floats (width 32) it is 1
 *   epsilon of the norms: y = x / sqrt(mean of squares + epsilon); needed with one
 *   activation  silu or gelu_tanh; needed with a gate
 * A pivoted pair has the rows of V themselves as outputs, and U for the others alone: V x, then U V x, are the outputs that
 * its order names. The order is a tensor behind U, bytes of as many little-endian int32 as the projection has rows; all
 * ranks are read. A projection is its bias, to which its parts are added in their order: planes, then pairs, which are all
 * pivoted or none. Planes of integers multiply x and V x as int8, planes of floats these themselves; the outputs that V x
 * is are not rounded.
 */
#include "linear.h"

static const char *name(const OrtCustomOp *op) { return (void)op, "Linear"; }
static const char *any_provider(const OrtCustomOp *op) { return (void)op, NULL; }
static int input_type(const OrtCustomOp *op, size_t i) {
  return (void)op, i == IN_TILES ? ORT_UINT8 : i == IN_START ? ORT_INT64 : ORT_FLOAT;
}
static int output_type(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_FLOAT; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, IN_TILES + 1; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 1; }
static int input_characteristic(const OrtCustomOp *op, size_t i) {
  return (void)op, i == IN_TILES ? ORT_VARIADIC : i == IN_X ? ORT_REQUIRED : ORT_OPTIONAL;
}
static int output_characteristic(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_VARIADIC; }
static int default_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }
static int any_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

const OrtCustomOp flrc_linear = {
    .version = FLRC_ORT_VERSION,
    .get_name = name,
    .get_execution_provider = any_provider,
    .get_input_type = input_type,
    .get_input_count = input_count,
    .get_output_type = output_type,
    .get_output_count = output_count,
    .destroy_kernel = flrc_linear_destroy,
    .get_input_characteristic = input_characteristic,
    .get_output_characteristic = output_characteristic,
    .get_input_memory = default_memory,
    .get_variadic_input_least = one,
    .get_variadic_input_alike = one,
    .get_variadic_output_least = one,
    .get_variadic_output_alike = one,
    .create_kernel_2 = flrc_linear_create,
    .compute_2 = flrc_linear_compute,
    .get_first_version = one,
    .get_last_version = any_version,
};
