// Forward of the LSTM with recurrent batch normalisation: each worker has some units, and of them
// all rows; h, which is y of the step before, is all that they share.
#pragma once

#include "batch_norm.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
struct BatchNormScratch {
  scalar_t *w_ih, *w_hh;               // panels
  scalar_t *gain_ih, *gain_hh, *bias;  // in the order of panels
  scalar_t* gx;                        // (chunk rows, panels)
  scalar_t* own;                       // (workers, B, 6 vectors) products with w_hh, c, o
  int64_t own_size;
};

template <class scalar_t>
BatchNormScratch<scalar_t> batch_norm_scratch(const BatchNormArgs<scalar_t>& args, int workers,
                                              Arena& arena) {
  const Panels<scalar_t> gates{args.hidden_size, 4};
  BatchNormScratch<scalar_t> s{};
  s.w_ih = arena.take<scalar_t>(gates.padded() * args.input_size);
  s.w_hh = arena.take<scalar_t>(gates.padded() * args.hidden_size);
  s.gain_ih = arena.take<scalar_t>(gates.padded());
  s.gain_hh = arena.take<scalar_t>(gates.padded());
  s.bias = arena.take<scalar_t>(gates.padded());
  s.gx = arena.take<scalar_t>(chunk_capacity(args.rows, args.batch, kForwardChunkRows) *
                              gates.padded());
  s.own_size = args.batch * 6 * lanes_of<scalar_t> + 64;
  s.own = arena.take<scalar_t>(s.own_size * workers);
  return s;
}

template <class scalar_t>
class BatchNormForward {
 public:
  BatchNormForward(const BatchNormArgs<scalar_t>& args, const BatchNormScratch<scalar_t>& scratch,
                   const Worker& worker)
      : args_(args),
        norm_(args.norm),
        s_(scratch),
        worker_(worker),
        gates_{args.hidden_size, 4},
        panels_(part_of(gates_.count(), worker.index, worker.count)),
        gh_(scratch.own + worker.index * scratch.own_size),
        c_(gh_ + args.batch * kGhRow),
        o_(c_ + args.batch * kLanes) {}

  void run() {
    start();
    Range chunk{0, 0};
    for (int64_t t = 0; t < args_.seq_len; ++t) {
      if (t >= chunk.end) {
        chunk = chunk_of(args_, t, false, kForwardChunkRows);
        project_inputs(chunk);
      }
      const int64_t first = first_row(args_, t) - first_row(args_, chunk.begin);
      const scalar_t* h = t > 0 ? args_.y + first_row(args_, t - 1) * args_.hidden_size : args_.h0;
      for (int64_t p = panels_.begin; p < panels_.end; ++p)
        step(t, p, s_.gx + first * gates_.padded() + gates_.offset(p), h);
      barrier(worker_);  // the next step reads all of h
    }
  }

 private:
  using V = vector_of<scalar_t>;
  static constexpr int64_t kLanes = lanes_of<scalar_t>, kGhRow = 4 * kLanes;

  void start() {
    const int64_t H = args_.hidden_size;
    for (int64_t p = panels_.begin; p < panels_.end; ++p) {
      pack_units(gates_, p, args_.input_size, args_.w_ih, s_.w_ih);
      pack_units(gates_, p, H, args_.w_hh, s_.w_hh);
      pack_bias(gates_, p, norm_.gain_ih, s_.gain_ih);
      pack_bias(gates_, p, norm_.gain_hh, s_.gain_hh);
      if (args_.b_ih) {
        pack_bias(gates_, p, args_.b_ih, s_.bias);
      } else {
        for (int64_t i = 0; i < kGhRow; ++i) s_.bias[gates_.offset(p) + i] = scalar_t(0);
      }
    }
    const Range units = columns_of(gates_, panels_);
    for (int64_t b = 0; b < args_.batch; ++b)
      for (int64_t u = units.begin; u < units.end; ++u) args_.c_n[b * H + u] = args_.c0[b * H + u];
  }

  void product(int64_t rows, int64_t p, int64_t k_size, const scalar_t* a, const scalar_t* w,
               scalar_t* out, int64_t out_row) {
    multiply(rows, 4,
             Operands<scalar_t>{k_size, a, k_size, 1, packed_panel(gates_, p, k_size, w), nullptr,
                                0, out, out_row});
  }

  void project_inputs(Range chunk) {
    const int64_t base = first_row(args_, chunk.begin),
                  rows = first_row(args_, chunk.end - 1) + active(args_, chunk.end - 1) - base;
    for (int64_t p = panels_.begin; p < panels_.end; ++p)
      product(rows, p, args_.input_size, args_.x.data + base * args_.input_size, s_.w_ih,
              s_.gx + gates_.offset(p), gates_.padded());
  }

  // Step t of one panel: a vector of units with all their gates, and all rows. gx: its first row.
  void step(int64_t t, int64_t p, const scalar_t* gx, const scalar_t* h) {
    using S = Statistics<scalar_t>;
    const int64_t H = args_.hidden_size, rows = active(args_, t), base = first_row(args_, t);
    const int64_t unit = gates_.first(p), left = gates_.valid(p), gx_row = gates_.padded();
    product(rows, p, H, h, s_.w_hh, gh_, kGhRow);

    const bool own = of_batch(args_, norm_, t);
    S s;
    if (own) {
      moments<4>(rows, gx, gx_row, s.mean + S::kInput, s.var + S::kInput);
      moments<4>(rows, gh_, kGhRow, s.mean + S::kHidden, s.var + S::kHidden);
    } else {
      const int64_t at = smaller(t, args_.max_steps - 1) * kBatchNormStatistics * H + unit;
      s.load(args_.running_mean + at, args_.running_var + at, H, left);
    }
    // a = x_scale * gx + h_scale * gh + start
    V x_scale[4], h_scale[4], start[4];
    for (int g = 0; g < 4; ++g) {
      const int64_t at = gates_.offset(p) + g * kLanes;
      x_scale[g] = load(s_.gain_ih + at) * s.inverse(S::kInput + g, norm_.eps);
      h_scale[g] = load(s_.gain_hh + at) * s.inverse(S::kHidden + g, norm_.eps);
      start[g] = load(s_.bias + at);
    }
    for (int64_t r = 0; r < rows; ++r) {
      V x[4], hidden[4], a[4];
      RNNFAST_UNROLL
      for (int g = 0; g < 4; ++g) {
        x[g] = load(gx + r * gx_row + g * kLanes);
        hidden[g] = load(gh_ + r * kGhRow + g * kLanes);
        // differences first: means may be far larger than what rows differ by
        a[g] = x_scale[g] * (x[g] - s.mean[S::kInput + g]) +
               (h_scale[g] * (hidden[g] - s.mean[S::kHidden + g]) + start[g]);
      }
      const V i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), o = sigmoid(a[3]);
      scalar_t* state = args_.c_n + r * H + unit;
      const V c = f * load_part(state, left) + i * g;
      store_part(state, c, left);
      store(c_ + r * kLanes, c);
      store(o_ + r * kLanes, o);
      if (args_.saved) {
        scalar_t* kept = args_.saved + (base + r) * kBatchNormPlanes * H + unit;
        const V gates[4] = {i, f, g, o};
        RNNFAST_UNROLL
        for (int k = 0; k < 4; ++k) {
          store_part(kept + k * H, gates[k], left);
          store_part(kept + (4 + k) * H, x[k], left);
          store_part(kept + (8 + k) * H, hidden[k], left);
        }
        store_part(kept + 12 * H, c, left);
      }
    }
    if (own) moments<1>(rows, c_, kLanes, s.mean + S::kC, s.var + S::kC);
    const V c_scale = load_part(norm_.gain_c + unit, left) * s.inverse(S::kC, norm_.eps),
            c_start = load_part(norm_.bias_c + unit, left);
    const int64_t next = t + 1 < args_.seq_len ? active(args_, t + 1) : 0;
    for (int64_t r = 0; r < rows; ++r) {
      const V c = load(c_ + r * kLanes);
      const V out = load(o_ + r * kLanes) * tanh(c_scale * (c - s.mean[S::kC]) + c_start);
      store_part(args_.y + (base + r) * H + unit, out, left);
      if (r >= next) store_part(args_.h_n + r * H + unit, out, left);
    }
    if (args_.mean) {
      const int64_t at = t * kBatchNormStatistics * H + unit;
      s.store(args_.mean + at, args_.var + at, H, left);
    }
  }

  const BatchNormArgs<scalar_t>& args_;
  const BatchNorm<scalar_t>& norm_;
  const BatchNormScratch<scalar_t>& s_;
  const Worker worker_;
  const Panels<scalar_t> gates_;
  const Range panels_;
  scalar_t *const gh_, *const c_, *const o_;
};

template <class scalar_t>
void run_batch_norm_forward(const BatchNormArgs<scalar_t>& args, char* memory,
                            const Worker& worker) {
  Arena arena{memory, 0};
  const auto scratch = batch_norm_scratch(args, worker.count, arena);
  BatchNormForward<scalar_t>(args, scratch, worker).run();
}

template <class scalar_t>
int64_t batch_norm_forward_bytes(const BatchNormArgs<scalar_t>& args, int workers) {
  Arena arena;
  batch_norm_scratch(args, workers, arena);
  return arena.used;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
