// Small kernels over rows that are no step: gradients of the initial states, planes taken out of
// what forward saved, masks of h, and sums of columns.
#pragma once

#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// to(row, column) = from(row, column), or zero where the row started anew.
template <class from_t, class to_t>
struct CopyRows {
  int64_t rows, columns;
  const from_t* from;
  int64_t from_row;  // between rows
  to_t* to;
  int64_t to_row;
  const uint8_t* reset;  // (rows), or null
};

template <class from_t, class to_t>
__global__ void __launch_bounds__(kThreads, kBlocks<to_t>)
    copy_rows(const CopyRows<from_t, to_t> p) {
  const int64_t column = first_column();
  wait_for_launch_before();
  if (column >= p.columns) return;
  for (int64_t row = first_row(); row < p.rows; row += row_stride()) {
    const bool zero = p.reset && p.reset[row];
    narrow(zero ? widen(from_t{}) : widen(p.from[row * p.from_row + column]),
           p.to[row * p.to_row + column]);
  }
}

// to = where a row's h is kept, scaled, else 0; of rows [0, carried) from `before`, of the others
// from h0. `to` may be `before`.
template <class scalar_t>
struct DropRows {
  int64_t rows, columns, carried;
  const scalar_t *before, *h0;
  const uint8_t* kept;  // (rows, columns)
  accumulator_of<scalar_t> scale;
  scalar_t* to;
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    drop_rows(const DropRows<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  const int64_t column = first_column();
  wait_for_launch_before();
  if (column >= p.columns) return;
  for (int64_t row = first_row(); row < p.rows; row += row_stride()) {
    const int64_t at = row * p.columns + column;
    const scalar_t* from = row < p.carried ? p.before : p.h0;
    narrow(p.kept[at] ? widen(from[at]) * p.scale : acc_t{}, p.to[at]);
  }
}

// Its gradient: to (+)= where h is kept, scaled, else 0.
template <class acc_t>
struct AddDropped {
  int64_t rows, columns;
  const acc_t* from;
  const uint8_t* kept;
  acc_t scale;
  bool add;
  acc_t* to;
};

template <class acc_t>
__global__ void __launch_bounds__(kThreads, kBlocks<acc_t>) add_dropped(const AddDropped<acc_t> p) {
  const int64_t column = first_column();
  wait_for_launch_before();
  if (column >= p.columns) return;
  for (int64_t row = first_row(); row < p.rows; row += row_stride()) {
    const int64_t at = row * p.columns + column;
    const acc_t through = p.kept[at] ? p.from[at] * p.scale : acc_t{};
    p.to[at] = p.add ? p.to[at] + through : through;
  }
}

// Sums over the rows of a, or of a*b: first over slices of the rows, then over the slices, both in
// a fixed order, so that the bits do not depend on which block comes first.
template <class scalar_t>
struct SumRows {
  using acc_t = accumulator_of<scalar_t>;
  int64_t rows, columns, slice;
  const scalar_t *a, *b;   // (rows, columns); b may be null
  acc_t* parts;            // (slices, columns)
  scalar_t *to, *also_to;  // (columns); the second may be null
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    sum_slices(const SumRows<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  const int64_t column = first_column(), slices = (p.rows + p.slice - 1) / p.slice;
  wait_for_launch_before();
  if (column >= p.columns) return;
  for (int64_t k = first_row(); k < slices; k += row_stride()) {
    const int64_t begin = k * p.slice;
    const int64_t end = begin + p.slice < p.rows ? begin + p.slice : p.rows;
    acc_t sum{};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * p.columns + column;
      const acc_t a = widen(p.a[at]);
      sum += p.b ? a * widen(p.b[at]) : a;
    }
    p.parts[k * p.columns + column] = sum;
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    sum_parts(const SumRows<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  const int64_t column = first_column(), slices = (p.rows + p.slice - 1) / p.slice;
  wait_for_launch_before();
  if (column >= p.columns || first_row() > 0) return;
  acc_t sum{};
  for (int64_t k = 0; k < slices; ++k) sum += p.parts[k * p.columns + column];
  narrow(sum, p.to[column]);
  if (p.also_to) narrow(sum, p.also_to[column]);
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
