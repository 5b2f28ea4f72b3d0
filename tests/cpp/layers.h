// What the tests of engines share: layers with their numbers, results and gradients in buffers of
// exactly the size that a layer has, and a count of checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/args.h"
#include "core/cell_info.h"

namespace rnnfast {

inline int failures = 0, checks = 0;

inline void check(bool good, const std::string& what) {
  ++checks;
  if (!good) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

using Values = std::vector<double>;

struct Layer {
  int cell;
  int64_t T, B, I, H, P;
  bool reverse;
  std::vector<int64_t> batch_sizes, offsets;
  std::vector<uint8_t> reset, zone, h_kept;
  Values x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr;

  Layer(int cell_id, int64_t t, int64_t b, int64_t i, int64_t h, int64_t p, bool uneven,
        bool backwards)
      : cell(cell_id), T(t), B(b), I(i), H(h), P(p ? p : h), reverse(backwards) {
    const CellInfo& info = cell_info(cell);
    std::mt19937 random(1);
    std::uniform_real_distribution<double> uniform(-0.5, 0.5);
    const auto fill = [&](Values& values, int64_t size) {
      values.resize(size);
      for (double& v : values) v = uniform(random);
    };
    int64_t rows = T * B;
    if (uneven) {
      offsets.push_back(0);
      for (int64_t s = 0; s < T; ++s) {
        batch_sizes.push_back(std::max<int64_t>(1, B - s * B / T));
        offsets.push_back(offsets.back() + batch_sizes.back());
      }
      rows = offsets.back();
    }
    fill(x, rows * I);
    fill(h0, B * P);
    fill(c0, (info.states - 1) * B * H);
    if (info.states == 4)  // sLSTM's second is a normaliser, which divides and is never negative
      for (int64_t i = B * H; i < 2 * B * H; ++i) c0[i] = 0.5 + std::fabs(c0[i]);
    fill(w_ih, info.gates * H * I);
    fill(w_hh, info.dense ? info.gates * H * P : info.diagonal ? H : 0);
    fill(b_ih, info.gates * H);
    fill(b_hh, (info.gates + info.parameters) * H);
    if (p) fill(w_hr, P * H);
  }

  // Every third row starts anew: some at every step, and some at the first.
  Layer with_resets() const {
    Layer layer = *this;
    layer.reset.resize(rows());
    for (int64_t row = 0; row < rows(); ++row) layer.reset[row] = row % 3 == 1;
    return layer;
  }
  // Of h as it enters a matrix, and of the states where the cell keeps them.
  Layer with_masks() const {
    Layer layer = *this;
    const CellInfo& info = cell_info(cell);
    if (may_drop()) layer.h_kept.resize(B * P);
    if (info.keeps) layer.zone.resize(rows() * info.states * H);
    std::mt19937 random(2);
    for (std::vector<uint8_t>* flags : {&layer.h_kept, &layer.zone})
      for (uint8_t& flag : *flags) flag = random() % 3 == 0;
    return layer;
  }
  // What the layers of Python allow (bindings/checks.cpp): a mask of h, and a projection.
  bool may_drop() const { return cell_info(cell).dense && !cell_info(cell).stages; }
  static bool may_project(int cell) {
    const CellInfo& info = cell_info(cell);
    return info.states == 2 && info.dense && !info.keeps && !info.stages;
  }
  int64_t rows() const { return static_cast<int64_t>(x.size()) / I; }
  int64_t planes() const {
    const CellInfo& info = cell_info(cell);
    return info.saved + info.states - 1 + (w_hr.empty() ? 0 : 1);
  }
  void fill(LayerArgs<double>& args) const {
    args.seq_len = T, args.batch = B, args.input_size = I, args.hidden_size = H,
    args.output_size = P, args.rows = rows();
    args.batch_sizes = batch_sizes.empty() ? nullptr : batch_sizes.data();
    args.offsets = batch_sizes.empty() ? nullptr : offsets.data();
    args.reverse = reverse;
    args.reset = reset.empty() ? nullptr : reset.data();
    if (!zone.empty()) args.masks.zone = zone.data();
    if (!zone.empty()) args.masks.keep[0] = 0.25, args.masks.keep[1] = 0.5;
    if (!h_kept.empty()) args.masks.h_kept = h_kept.data(), args.masks.h_scale = 1.5;
    args.x = {x.data(), B * I, I};
    args.h0 = h0.data(), args.c0 = c0.data(), args.w_ih = w_ih.data(), args.w_hh = w_hh.data();
    args.b_ih = b_ih.data(), args.b_hh = b_hh.data(),
    args.w_hr = w_hr.empty() ? nullptr : w_hr.data();
  }
};

struct Outputs {
  Values y, h_n, c_n, saved;
};

inline ForwardArgs<double> forward_args(const Layer& layer, Outputs& out) {
  ForwardArgs<double> args{};
  layer.fill(args);
  args.y = out.y.data(), args.h_n = out.h_n.data(), args.c_n = out.c_n.data(),
  args.saved = out.saved.data();
  return args;
}

inline Values weights_of_sum(size_t size) {
  Values values(size);
  for (size_t i = 0; i < size; ++i) values[i] = std::sin(1.0 + static_cast<double>(i % 17));
  return values;
}

struct Gradients {
  Values x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr;
};

inline Gradients room(const Layer& layer) {
  return {Values(layer.x.size()),    Values(layer.h0.size()),   Values(layer.c0.size()),
          Values(layer.w_ih.size()), Values(layer.w_hh.size()), Values(layer.b_ih.size()),
          Values(layer.b_hh.size()), Values(layer.w_hr.size())};
}

struct Cotangents {
  Values dy, dh, dc;
  explicit Cotangents(const Outputs& out)
      : dy(weights_of_sum(out.y.size())),
        dh(weights_of_sum(out.h_n.size())),
        dc(weights_of_sum(out.c_n.size())) {}
};

inline BackwardArgs<double> backward_args(const Layer& layer, const Outputs& out,
                                          const Cotangents& from, const Values& dy, Gradients& g) {
  BackwardArgs<double> args{};
  layer.fill(args);
  args.dy = {dy.data(), layer.B * layer.P, layer.P};
  args.dh_n = from.dh.data(), args.dc_n = from.dc.data(), args.y = out.y.data(),
  args.saved = out.saved.data();
  args.dx = g.x.data(), args.dh0 = g.h0.data(), args.dc0 = g.c0.data(), args.dw_ih = g.w_ih.data();
  args.dw_hh = g.w_hh.data(), args.db_ih = g.b_ih.data(), args.db_hh = g.b_hh.data();
  args.dw_hr = layer.w_hr.empty() ? nullptr : g.w_hr.data();
  return args;
}

inline bool near(const Values& a, const Values& b, double tolerance) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - b[i]) <= tolerance)) return false;
  return a.size() == b.size();
}
inline bool same_bits(const Values& a, const Values& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}
inline bool same_bits(const Outputs& a, const Outputs& b) {
  return same_bits(a.y, b.y) && same_bits(a.h_n, b.h_n) && same_bits(a.c_n, b.c_n) &&
         same_bits(a.saved, b.saved);
}
inline bool same_bits(const Gradients& a, const Gradients& b) {
  return same_bits(a.x, b.x) && same_bits(a.h0, b.h0) && same_bits(a.c0, b.c0) &&
         same_bits(a.w_ih, b.w_ih) && same_bits(a.w_hh, b.w_hh) && same_bits(a.b_ih, b.b_ih) &&
         same_bits(a.b_hh, b.b_hh) && same_bits(a.w_hr, b.w_hr);
}

}  // namespace rnnfast
