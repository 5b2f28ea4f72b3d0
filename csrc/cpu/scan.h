// Scans on vectors: columns divided among workers; or, of long sequences with few columns, chunks
// of steps.
#pragma once

#include "../core/scan_pass.h"
#include "convert.h"
#include "pack.h"
#include "team.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr int64_t kInRegisters = 8;  // vectors of columns, at most, whose states stay there
// Columns, at most, that go from step to step together: what they carry is in the second cache, and
// longer pieces of rows come faster.
constexpr int64_t kTogether = 16384;

struct VectorMemory {
  RNNFAST_HD static void ask_for(const void* memory) { __builtin_prefetch(memory); }
  template <class V, class scalar_t>
  RNNFAST_HD static V load(const scalar_t* from) {
    if constexpr (sizeof(V) == RNNFAST_VECTOR_BYTES)
      return load_wide(from);
    else
      return widen_scalar(*from);
  }
  template <class V, class scalar_t>
  RNNFAST_HD static void store(scalar_t* to, V x) {
    if constexpr (sizeof(V) == RNNFAST_VECTOR_BYTES)
      store_narrow(to, x);
    else if constexpr (sizeof(V) == sizeof(scalar_t))
      *to = x;
    else
      store_narrow_part(to, x - Float32Vector{}, 1);
  }
};

// Columns side by side, and where each has its place among what is carried: in whole vectors, of
// which the last may begin before the one before it ends (both then find the same); or as single
// numbers where there is not even one vector.
template <class acc_t>
struct Columns {
  static constexpr int64_t kLanes = lanes_of<acc_t>;
  int64_t row, first, count;

  int64_t places() const { return count < kLanes ? count : divide_up(count, kLanes) * kLanes; }
  // use(number of the kind to compute with, column after `first`, place)
  template <class Use>
  RNNFAST_HD void each(const Use& use) const {
    if (count < kLanes) {
      for (int64_t i = 0; i < count; ++i) use(acc_t{}, i, i);
      return;
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) use(vector_of<acc_t>{}, i, i);
    if (i < count) use(vector_of<acc_t>{}, count - kLanes, i);
  }
};

// What `take` and `follow` of a pass carry from step to step, for `count` places side by side.
template <class Pass, class V>
struct Taking {
  V carried;
  RNNFAST_HD void load(const scalar_of<V>* from, const scalar_of<V>*) {
    __builtin_memcpy(&carried, from, sizeof(V));
  }
  RNNFAST_HD void store(scalar_of<V>* to, scalar_of<V>*) const {
    __builtin_memcpy(to, &carried, sizeof(V));
  }
  RNNFAST_HD void step(const typename Pass::Step& at, int64_t i) {
    carried = Pass::take(at, i, carried);
  }
};
template <class Pass, class V>
struct Following {
  V carried, product;
  RNNFAST_HD void load(const scalar_of<V>* from, const scalar_of<V>* from_product) {
    __builtin_memcpy(&carried, from, sizeof(V));
    __builtin_memcpy(&product, from_product, sizeof(V));
  }
  RNNFAST_HD void store(scalar_of<V>* to, scalar_of<V>* to_product) const {
    __builtin_memcpy(to, &carried, sizeof(V));
    __builtin_memcpy(to_product, &product, sizeof(V));
  }
  RNNFAST_HD void step(const typename Pass::Step& at, int64_t i) {
    carried = Pass::follow(at, i, carried, product);
  }
};

// Steps of `n` places, which stay in registers: their chains of dependent sums overlap.
template <class State, int n, class Pass, class acc_t>
void steps_in_registers(const Pass& pass, const Columns<acc_t>& columns, Range steps, int64_t place,
                        acc_t* carried, acc_t* product) {
  constexpr int64_t kWide = sizeof(State::carried) / sizeof(acc_t);
  State state[n];
  int64_t column[n];
  RNNFAST_UNROLL
  for (int j = 0; j < n; ++j) {
    const int64_t at = place + j * kWide;
    column[j] = columns.first + smaller(at, columns.count - kWide);
    state[j].load(carried + at, product + at);
  }
  for (int64_t k = steps.begin; k < steps.end; ++k) {
    const auto at = pass.step(k, columns.row);
    RNNFAST_UNROLL
    for (int j = 0; j < n; ++j) state[j].step(at, column[j]);
  }
  RNNFAST_UNROLL
  for (int j = 0; j < n; ++j)
    state[j].store(carried + place + j * kWide, product + place + j * kWide);
}

// Steps of some columns, from what enters them to what leaves. Taking leaves the product alone.
template <template <class, class> class State, class Pass, class acc_t>
void take_steps(const Pass& pass, const Columns<acc_t>& columns, Range steps, acc_t* carried,
                acc_t* product) {
  using V = vector_of<acc_t>;
  const int64_t places = columns.places();
  if (places <= kInRegisters * Columns<acc_t>::kLanes) {
    const auto groups = [&](auto kind, int64_t wide) {
      using S = State<Pass, decltype(kind)>;
      int64_t at = 0;
      for (; at + 8 * wide <= places; at += 8 * wide)
        steps_in_registers<S, 8>(pass, columns, steps, at, carried, product);
      for (; at + 4 * wide <= places; at += 4 * wide)
        steps_in_registers<S, 4>(pass, columns, steps, at, carried, product);
      for (; at + 2 * wide <= places; at += 2 * wide)
        steps_in_registers<S, 2>(pass, columns, steps, at, carried, product);
      for (; at < places; at += wide)
        steps_in_registers<S, 1>(pass, columns, steps, at, carried, product);
    };
    return columns.count < Columns<acc_t>::kLanes ? groups(acc_t{}, 1)
                                                  : groups(V{}, Columns<acc_t>::kLanes);
  }
  // Backward goes through short rows from left to right and from the last to the first, which no
  // prefetcher follows: it is asked for what comes a little later.
  constexpr int64_t kAhead = 2048, kLongRow = 8192;
  const int64_t row_bytes = columns.count * static_cast<int64_t>(sizeof(acc_t));
  const int64_t ahead = row_bytes < kLongRow ? divide_up(kAhead, row_bytes) : steps.size();
  for (int64_t k = steps.begin; k < steps.end; ++k) {
    const auto at = pass.step(k, columns.row);
    const bool asks = k + ahead < steps.end;
    const auto later = pass.step(asks ? k + ahead : k, columns.row);
    columns.each([&](auto kind, int64_t i, int64_t place) __attribute__((always_inline)) {
      if (asks) pass.ask_for(later, columns.first + i);
      State<Pass, decltype(kind)> state;
      state.load(carried + place, product + place);
      state.step(at, columns.first + i);
      state.store(carried + place, product + place);
    });
  }
}

template <class Pass, class acc_t>
void enter(const Pass& pass, const Columns<acc_t>& columns, acc_t* carried) {
  columns.each([&](auto kind, int64_t i, int64_t place) {
    const auto v = pass.template start<decltype(kind)>(columns.row, columns.first + i);
    __builtin_memcpy(carried + place, &v, sizeof(v));
  });
}
template <class Pass, class acc_t>
void leave(const Pass& pass, const Columns<acc_t>& columns, const acc_t* carried) {
  columns.each([&](auto kind, int64_t i, int64_t place) {
    auto v = kind;
    __builtin_memcpy(&v, carried + place, sizeof(v));
    pass.end(columns.row, columns.first + i, v);
  });
}

// A worker's columns, for all steps.
template <class Pass>
void scan_columns(const Pass& pass, char* memory, const Worker& worker) {
  using acc_t = accumulator_of<typename Pass::scalar_t>;
  constexpr int64_t kLanes = lanes_of<acc_t>;
  acc_t* const carried = reinterpret_cast<acc_t*>(memory) + worker.index * kTogether;
  const int64_t vectors = divide_up(pass.p.columns, kLanes);
  const Range mine = part_of(pass.p.rows * vectors, worker.index, worker.count);
  for (int64_t at = mine.begin; at < mine.end;) {
    const int64_t row = at / vectors, v = at % vectors;
    const int64_t count = smaller(smaller(vectors - v, mine.end - at), kTogether / kLanes);
    const int64_t first = v * kLanes;
    const Columns<acc_t> columns{row, first, smaller(count * kLanes, pass.p.columns - first)};
    enter(pass, columns, carried);
    take_steps<Taking>(pass, columns, {0, pass.p.seq_len}, carried, carried);
    leave(pass, columns, carried);
    at += count;
  }
}

// What is carried by all columns, and of the chunks of two blocks what `follow` found: two, so that
// workers who are a block ahead overwrite nothing.
template <class acc_t>
struct ChunkMemory {
  int64_t places, chunks;
  acc_t* base;

  acc_t* result(int64_t block, int64_t chunk) const {
    return base + ((block % 2 * chunks + chunk) * 2) * places;
  }
  acc_t* product(int64_t block, int64_t chunk) const { return result(block, chunk) + places; }
  acc_t* own(int64_t worker) const {  // what enters the next block, and the worker's chunk
    return base + (chunks * 4 + worker * 2) * places;
  }
  static int64_t numbers(int64_t places, int64_t chunks, int64_t workers) {
    return (chunks * 4 + workers * 2) * places;
  }
};

// What leaves a chunk, from what enters it.
template <class Pass, class acc_t>
void join(const Pass& pass, const Columns<acc_t>& columns, Range steps, const acc_t* result,
          const acc_t* product, acc_t* carried) {
  columns.each([&](auto kind, int64_t i, int64_t place) {
    using V = decltype(kind);
    V v, m, r;
    __builtin_memcpy(&v, carried + place, sizeof(v));
    __builtin_memcpy(&m, product + place, sizeof(m));
    __builtin_memcpy(&r, result + place, sizeof(r));
    bool tame = true;
    for (size_t lane = 0; lane < sizeof(V) / sizeof(acc_t); ++lane)
      tame &= is_tame(product[place + lane], result[place + lane], carried[place + lane]);
    if (tame)
      v = m * v + r;
    else
      for (int64_t k = steps.begin; k < steps.end; ++k)
        v = pass.follow(pass.step(k, columns.row), columns.first + i, v, m);
    __builtin_memcpy(carried + place, &v, sizeof(v));
  });
}

// All columns, a block of steps after the other: workers follow its chunks, meet, join them, and
// take the steps of those that they followed, which are still in the cache.
template <class Pass>
void scan_chunks(const Pass& pass, const ScanChunks& cut, char* memory, const Worker& worker) {
  using acc_t = accumulator_of<typename Pass::scalar_t>;
  const int64_t rows = pass.p.rows, each_row = Columns<acc_t>{0, 0, pass.p.columns}.places();
  const ChunkMemory<acc_t> found{rows * each_row, cut.count, reinterpret_cast<acc_t*>(memory)};
  acc_t* const entering = found.own(worker.index);
  acc_t* const carried = entering + found.places;
  const auto each = [&](const auto& use) {
    for (int64_t row = 0; row < rows; ++row)
      use(Columns<acc_t>{row, 0, pass.p.columns}, row * each_row);
  };
  const auto copy = [&](const acc_t* from, acc_t* to) {
    for (int64_t i = 0; i < found.places; ++i) to[i] = from[i];
  };
  const Range mine = part_of(cut.count, worker.index, worker.count);

  each([&](const auto& columns, int64_t at) { enter(pass, columns, entering + at); });
  int64_t block = 0;
  for (int64_t begin = 0; begin < pass.p.seq_len; begin += cut.steps, ++block) {
    const int64_t steps = smaller(cut.steps, pass.p.seq_len - begin);
    const auto steps_of = [&](int64_t chunk) {
      const Range part = part_of(steps, chunk, cut.count);
      return Range{begin + part.begin, begin + part.end};
    };
    for (int64_t c = mine.begin; c < mine.end; ++c) {
      acc_t *const result = found.result(block, c), *const product = found.product(block, c);
      for (int64_t i = 0; i < found.places; ++i) result[i] = 0, product[i] = 1;
      each([&](const auto& columns, int64_t at) {
        take_steps<Following>(pass, columns, steps_of(c), result + at, product + at);
      });
    }
    barrier(worker);
    for (int64_t c = 0; c < cut.count; ++c) {
      if (c >= mine.begin && c < mine.end) {
        copy(entering, carried);
        each([&](const auto& columns, int64_t at) {
          take_steps<Taking>(pass, columns, steps_of(c), carried + at, carried + at);
        });
      }
      const acc_t *const result = found.result(block, c), *const product = found.product(block, c);
      each([&](const auto& columns, int64_t at) {
        join(pass, columns, steps_of(c), result + at, product + at, entering + at);
      });
    }
  }
  if (worker.index == worker.count - 1)
    each([&](const auto& columns, int64_t at) { leave(pass, columns, entering + at); });
}

template <template <class, class> class Pass, class Args>
void scan(const Args& args, const ScanChunks& cut, char* memory, const Worker& worker) {
  const Pass<typename Args::scalar_t, VectorMemory> pass{args};
  if (cut.count > 1)
    scan_chunks(pass, cut, memory, worker);
  else
    scan_columns(pass, memory, worker);
}

template <class scalar_t>
int64_t scan_bytes(int64_t rows, int64_t columns, const ScanChunks& cut, int workers) {
  using acc_t = accumulator_of<scalar_t>;
  const int64_t places = rows * Columns<acc_t>{0, 0, columns}.places();
  const int64_t numbers =
      cut.count > 1 ? ChunkMemory<acc_t>::numbers(places, cut.count, workers) : workers * kTogether;
  return numbers * static_cast<int64_t>(sizeof(acc_t));
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
