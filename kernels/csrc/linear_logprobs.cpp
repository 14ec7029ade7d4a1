// The work of the language-model head between its matrix products, on the logits of a chunk of tokens: statistics of
// the softmax, log-probability of the target, and the gradient of the logits. linear_logprobs and linear_policy_loss
// use it.
//
// Rows of logits are `row_stride` values apart. `targets`, `row_max`, `row_sum`, `logprobs` and `grad_logprobs` have
// one value per row of the chunk. `rows` lists the rows that have a gradient, in rising order. The gradient of row
// rows[i] is written to row i, over the logits or to another array, so that the following matrix products use only rows
// with a gradient. The blocks of work do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "native.h"
#include "parallel.h"
#include "softmax.h"

namespace {

using balcaprl::parallel_for;
using balcaprl::softmax_table;
using balcaprl::SoftmaxRow;
using balcaprl::SoftmaxStats;

constexpr int64_t kStripe = 1024;    // columns in a block of work that covers all rows
constexpr int64_t kRowPart = 16384;  // columns in a block of work that covers one row
constexpr int64_t kRowBlock = 8;     // rows in a block of work

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

int64_t size_of(int32_t type) { return type == balcaprl::kFloat32 ? 4 : 2; }

// The logits of a chunk of tokens, or a range of columns of these logits.
struct Logits {
  char* data;
  int32_t type;
  int64_t row_stride;
  int64_t num_columns;

  char* at(int64_t row, int64_t column) const { return data + (row * row_stride + column) * size_of(type); }
};

// Scale, targets, statistics and incoming gradients of all rows; row(t) computes the parameters of a row's gradient.
struct RowValues {
  float scale;
  const int64_t* targets;
  const float* max;
  const float* sum;
  const float* logprobs;
  const float* grad_logprobs;

  SoftmaxRow row(int64_t t) const {
    const float gradient = grad_logprobs[t] * scale;
    // 1 - p is computed as -expm1(log p), which stays accurate when p is near 1.
    return SoftmaxRow{max[t], scale, -gradient / sum[t], -gradient * std::expm1(logprobs[t])};
  }
};

bool valid_type(int32_t type) { return type >= 0 && type < balcaprl::kNumLogitsTypes; }

bool valid_rows(const int64_t* rows, int64_t num_rows) {
  for (int64_t i = 0; i < num_rows; ++i) {
    if (rows[i] < (i == 0 ? 0 : rows[i - 1] + 1)) return false;
  }
  return true;
}

bool valid_targets(const int64_t* targets, int64_t count, int64_t vocabulary) {
  return std::all_of(targets, targets + count, [=](int64_t y) { return y >= 0 && y < vocabulary; });
}

}  // namespace

// Writes row_max, row_sum and logprobs, and entropy if `entropy` is not null. If a logit of a row is NaN or +inf, all
// logits are -inf, or the target's logit is -inf, then the row's logprob is NaN or infinite.
BALCAPRL_EXPORT int32_t balcaprl_softmax_stats(int32_t type, const void* logits, int64_t row_stride, int64_t num_rows,
                                               int64_t vocabulary, double scale, const int64_t* targets,
                                               float* row_max, float* row_sum, float* logprobs, float* entropy) {
  if (!valid_type(type)) return balcaprl::kBadLogits;
  if (!valid_targets(targets, num_rows, vocabulary)) return balcaprl::kBadTargets;
  const auto& table = softmax_table();
  const Logits all{static_cast<char*>(const_cast<void*>(logits)), type, row_stride, vocabulary};
  parallel_for(blocks_of(num_rows, kRowBlock), [&](int64_t block) {
    for (int64_t t = block * kRowBlock; t < std::min(num_rows, (block + 1) * kRowBlock); ++t) {
      SoftmaxStats stats;
      table.stats[type](all.at(t, 0), vocabulary, static_cast<float>(scale), entropy != nullptr, &stats);
      const double chosen = table.value[type](all.at(t, targets[t]));
      row_max[t] = stats.max;
      row_sum[t] = static_cast<float>(stats.sum);
      logprobs[t] = static_cast<float>((chosen - static_cast<double>(stats.max)) * scale - std::log(stats.sum));
      if (entropy != nullptr) entropy[t] = static_cast<float>(stats.entropy);
    }
  });
  return balcaprl::kOk;
}

// Overwrites the logits with their gradient. The logits are columns [first_column, first_column + num_columns) of the
// vocabulary; targets are column numbers of the whole vocabulary.
BALCAPRL_EXPORT int32_t balcaprl_softmax_gradient(int32_t type, void* logits, int64_t row_stride, int64_t first_column,
                                                  int64_t num_columns, const int64_t* rows, int64_t num_rows,
                                                  double scale, const int64_t* targets, const float* row_max,
                                                  const float* row_sum, const float* logprobs,
                                                  const float* grad_logprobs) {
  if (!valid_type(type) || !valid_rows(rows, num_rows)) return balcaprl::kBadLogits;
  const auto& table = softmax_table();
  const Logits all{static_cast<char*>(logits), type, row_stride, num_columns};
  const RowValues values{static_cast<float>(scale), targets, row_max, row_sum, logprobs, grad_logprobs};
  const auto write = [&](int64_t i, int64_t begin, int64_t size) {
    const int64_t t = rows[i];
    table.gradient[type](all.at(t, begin), all.at(i, begin), size, values.row(t), targets[t] - first_column - begin);
  };
  if (num_rows == 0) return balcaprl::kOk;
  if (rows[num_rows - 1] == num_rows - 1) {
    // No row moves, so each row is written from start to end, which is fastest for memory.
    const int64_t parts = blocks_of(num_columns, kRowPart);
    parallel_for(num_rows * parts, [&](int64_t block) {
      const int64_t begin = block % parts * kRowPart;
      write(block / parts, begin, std::min(kRowPart, num_columns - begin));
    });
    return balcaprl::kOk;
  }
  // Each block takes a stripe of columns and goes through its rows in order, so that a row never overwrites one that is
  // still to be read.
  parallel_for(blocks_of(num_columns, kStripe), [&](int64_t block) {
    const int64_t begin = block * kStripe;
    for (int64_t i = 0; i < num_rows; ++i) write(i, begin, std::min(kStripe, num_columns - begin));
  });
  return balcaprl::kOk;
}

// Sets marks[v] to 1 if the softmax of column v is at least eps in one of the rows, or if v is the target of one of
// them; otherwise to 0.
BALCAPRL_EXPORT int32_t balcaprl_softmax_mark(int32_t type, const void* logits, int64_t row_stride, int64_t vocabulary,
                                              const int64_t* rows, int64_t num_rows, double scale,
                                              const int64_t* targets, const float* row_max, const float* row_sum,
                                              double eps, uint8_t* marks) {
  if (!valid_type(type) || !valid_rows(rows, num_rows)) return balcaprl::kBadLogits;
  const auto& table = softmax_table();
  const Logits all{static_cast<char*>(const_cast<void*>(logits)), type, row_stride, vocabulary};
  const double log_eps = std::log(eps);
  parallel_for(blocks_of(vocabulary, kStripe), [&](int64_t block) {
    const int64_t begin = block * kStripe, size = std::min(kStripe, vocabulary - begin);
    int32_t seen[kStripe] = {};
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t t = rows[i];
      // The logit at which p = eps, lowered a little so that rounding can only keep a column too many.
      const double threshold = static_cast<double>(row_max[t]) + (log_eps + std::log(row_sum[t]) - 1e-5) / scale;
      table.mark[type](all.at(t, begin), size, static_cast<float>(threshold), seen);
      const int64_t target = targets[t] - begin;
      if (target >= 0 && target < size) seen[target] = -1;
    }
    for (int64_t v = 0; v < size; ++v) marks[begin + v] = seen[v] != 0 ? 1 : 0;
  });
  return balcaprl::kOk;
}

// Writes the gradient of the listed rows and columns, both in rising order, to `out` (num_rows, num_columns), which
// must not overlap with the logits.
BALCAPRL_EXPORT int32_t balcaprl_softmax_gather_gradient(int32_t type, const void* logits, int64_t row_stride,
                                                         const int64_t* rows, int64_t num_rows, const int64_t* columns,
                                                         int64_t num_columns, double scale, const int64_t* targets,
                                                         const float* row_max, const float* row_sum,
                                                         const float* logprobs, const float* grad_logprobs, void* out) {
  if (!valid_type(type) || !valid_rows(rows, num_rows)) return balcaprl::kBadLogits;
  const auto& table = softmax_table();
  const Logits all{static_cast<char*>(const_cast<void*>(logits)), type, row_stride, 0};
  const Logits result{static_cast<char*>(out), type, num_columns, num_columns};
  const RowValues values{static_cast<float>(scale), targets, row_max, row_sum, logprobs, grad_logprobs};
  parallel_for(blocks_of(num_rows, kRowBlock), [&](int64_t block) {
    for (int64_t i = block * kRowBlock; i < std::min(num_rows, (block + 1) * kRowBlock); ++i) {
      const int64_t t = rows[i];
      const int64_t* found = std::lower_bound(columns, columns + num_columns, targets[t]);
      const bool here = found != columns + num_columns && *found == targets[t];
      table.gather_gradient[type](all.at(t, 0), result.at(i, 0), columns, num_columns, values.row(t),
                                  here ? found - columns : -1);
    }
  });
  return balcaprl::kOk;
}
