// A worker's share of a layer, and where the rows of a step
// are: what forward and backward have in common.
#pragma once

#include "../cells/cell.h"
#include "../core/args.h"
#include "../core/choose_engine.h"
#include "pack.h"
#include "team.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
RNNFAST_HD int64_t active(const LayerArgs<scalar_t>& args, int64_t t) {
  return args.batch_sizes ? args.batch_sizes[t] : args.batch;
}

template <class scalar_t>
RNNFAST_HD int64_t first_row(const LayerArgs<scalar_t>& args, int64_t t) {
  return args.offsets ? args.offsets[t] : t * args.batch;
}

template <class scalar_t, class pointer_t>
RNNFAST_HD pointer_t* step_of(const LayerArgs<scalar_t>& args, const Rows<pointer_t>& rows,
                              int64_t t) {
  return rows.data + (args.offsets ? args.offsets[t] * rows.row_stride : t * rows.step_stride);
}

// Whether zeros enter step t of row b, in place of the state before it or h0.
template <class scalar_t>
RNNFAST_HD bool starts_anew(const LayerArgs<scalar_t>& args, int64_t t, int64_t b) {
  return args.reset && args.reset[first_row(args, t) + b];
}

// What part of state `s` stays as it was in the lanes from `unit` on of one of the layer's rows.
template <class acc_t, class scalar_t>
RNNFAST_HD vector_of<acc_t> kept_part(const LayerArgs<scalar_t>& args, int states, int64_t row,
                                      int s, int64_t unit, int64_t count) {
  using V = vector_of<acc_t>;
  const V elsewhere = splat<V>(args.masks.keep[s == 0 ? 0 : 1]);
  if (!args.masks.zone) return elsewhere;
  const uint8_t* from = args.masks.zone + (row * states + s) * args.hidden_size + unit;
  return where_set<acc_t>(from, count, splat<V>(1.0), elsewhere);
}

// to = from where row b's h is kept, scaled, else 0: `columns` of them, the first of which is
// `column` of h. Whole vectors are read, of which to holds as much.
template <class acc_t, class scalar_t>
void drop_h(const LayerArgs<scalar_t>& args, int64_t b, int64_t column, int64_t columns,
            const acc_t* from, acc_t* to) {
  using V = vector_of<acc_t>;
  const V scale = splat<V>(args.masks.h_scale);
  const uint8_t* kept = args.masks.h_kept + b * args.output_size + column;
  for (int64_t u = 0; u < columns; u += lanes_of<acc_t>)
    store(to + u, where_set<acc_t>(kept + u, columns - u, load(from + u) * scale, V{}));
}

// The step whose state enters step t; its rows beyond active() enter from h0.
template <class scalar_t>
RNNFAST_HD int64_t previous(const LayerArgs<scalar_t>& args, int64_t t) {
  return args.reverse ? t + 1 : t - 1;
}

// Rows at step t that have a previous step (the others start from h0).
template <class scalar_t>
RNNFAST_HD int64_t continuing(const LayerArgs<scalar_t>& args, int64_t t) {
  const int64_t p = previous(args, t);
  return p < 0 || p >= args.seq_len ? 0 : smaller(active(args, p), active(args, t));
}

// Whether row b has no step after t.
template <class scalar_t>
RNNFAST_HD bool is_last(const LayerArgs<scalar_t>& args, int64_t t, int64_t b) {
  const int64_t next = args.reverse ? t - 1 : t + 1;
  return next < 0 || next >= args.seq_len || b >= active(args, next);
}

// Rows of the batch for part `index` of `count`, with nearly equal numbers of valid steps.
template <class scalar_t>
Range rows_part(const LayerArgs<scalar_t>& args, int64_t index, int64_t count) {
  if (!args.batch_sizes) return part_of(args.batch, index, count);
  const int64_t low = args.rows * index / count, high = args.rows * (index + 1) / count;
  Range range{args.batch, args.batch};
  int64_t steps = 0, length = args.seq_len;
  for (int64_t b = 0; b < args.batch; ++b) {
    if (steps >= low && range.begin == args.batch) range.begin = b;
    if (steps >= high) {
      range.end = b;
      break;
    }
    while (length > 0 && args.batch_sizes[length - 1] <= b) --length;
    steps += length;
  }
  if (index == count - 1) range.end = args.batch;
  if (range.begin > range.end) range.begin = range.end;
  return range;
}

// What one worker does: all units of some rows, or some panels of units of all rows.
struct Share {
  bool by_units;
  Range rows, panels, output_panels;
};

template <class scalar_t, class acc_t>
Share share_of(const LayerArgs<scalar_t>& args, const Choice& choice, const Worker& worker,
               const Panels<acc_t>& units, const Panels<acc_t>& outputs) {
  if (choice.split == Split::kBatch)
    return {false,
            rows_part(args, worker.index, worker.count),
            {0, units.count()},
            {0, outputs.count()}};
  return {true,
          {0, args.batch},
          part_of(units.count(), worker.index, worker.count),
          part_of(outputs.count(), worker.index, worker.count)};
}

// Consecutive steps [lo, hi) handled together. Starts at `from` in the direction of `down`, holds
// at least `target` rows if there are as many. Backward's target is fixed, since its sums go chunk
// by chunk; no bit of forward depends on one.
template <class scalar_t>
Range chunk_of(const LayerArgs<scalar_t>& args, int64_t from, bool down, int64_t target) {
  int64_t count = 0, t = from;
  while (t >= 0 && t < args.seq_len && count < target) {
    count += active(args, t);
    t += down ? -1 : 1;
  }
  return down ? Range{t + 1, from + 1} : Range{from, t};
}

RNNFAST_HD int64_t chunk_capacity(int64_t rows, int64_t batch, int64_t target) {
  return smaller(rows, target + batch);
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
