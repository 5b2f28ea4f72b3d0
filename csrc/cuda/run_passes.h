// Several passes at once, a stream each: both directions step by step in turn, layers a chunk of
// steps behind the one whose results they read.
#pragma once

#include <deque>

#include "engine.h"
#include "stage.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Pass>
using Passes = std::deque<Pass>;  // of things that need not move

template <class Pass>
Passes<Pass> passes_of(const typename Pass::Args* args, int count, const CudaChoice& choice,
                       Arena& arena) {
  Passes<Pass> passes;
  for (int i = 0; i < count; ++i) passes.emplace_back(args[i], choice, arena);
  return passes;
}

template <class Pass>
void run_chunk(Stage& stage, Pass& pass, int64_t chunk) {
  pass.begin_chunk(stage, chunk);
  const int64_t end = pass.schedule().end_of(chunk);
  for (int64_t step = pass.schedule().first_of(chunk); step < end;)
    step += pass.step(stage, step, end);
  pass.end_chunk(stage, chunk);
}

// In turn, so that neither waits for the host to have launched all of the other.
template <class Pass, class Use>
void run_beside(Stage& stage, Passes<Pass>& passes, const Use& use) {
  for (int64_t chunk = 0; chunk < passes[0].schedule().chunks(); ++chunk) {
    const auto each = [&](const auto& what) {
      for (size_t i = 0; i < passes.size(); ++i) {
        use(i);
        what(passes[i]);
      }
    };
    each([&](Pass& pass) { pass.begin_chunk(stage, chunk); });
    const int64_t end = passes[0].schedule().end_of(chunk);
    for (int64_t step = passes[0].schedule().first_of(chunk); step < end;) {
      int64_t taken = 0;
      // Directions have the same rows at the same time, but one runs it backwards: where one takes
      // several steps in a launch, the other takes what makes them even.
      each([&](Pass& pass) {
        const int64_t until = taken ? step + taken : end;
        int64_t at = step;
        do at += pass.step(stage, at, until);
        while (at < until && taken);
        taken = at - step;
      });
      step += taken;
    }
    each([&](Pass& pass) { pass.end_chunk(stage, chunk); });
  }
}

// In waves: in wave w, layer l runs chunk w - l. From the last layer to the first, so that the
// event on which a layer waits is still that of the chunk it reads.
template <class Pass, class Use>
void run_chained(Stage& stage, Passes<Pass>& passes, const Use& use) {
  const int64_t chunks = passes[0].schedule().chunks(),
                layers = static_cast<int64_t>(passes.size());
  std::deque<Event> ready(passes.size());
  for (int64_t wave = 0; wave < chunks + layers - 1; ++wave) {
    for (int64_t layer = layers - 1; layer >= 0; --layer) {
      const int64_t chunk = wave - layer;
      if (chunk < 0 || chunk >= chunks) continue;
      use(layer);
      if (layer > 0) stage.wait(ready[layer - 1]);
      run_chunk(stage, passes[layer], chunk);
      stage.record(ready[layer]);
    }
  }
}

// Joins the other streams to the caller's, which they must not outlast: not even where an error
// ends the call, since its scratch memory goes back to the caller's stream.
class Streams {
 public:
  // They begin after what the caller's stream has to do.
  Streams(Stage& stage, const CudaStream* streams, int count)
      : stage_(stage), streams_(streams), count_(count) {
    if (count < 2) return;
    stage.use(streams[0]);
    stage.record(begin_);
    for (int i = 1; i < count; ++i) {
      stage.use(streams[i]);
      stage.wait(begin_);
    }
  }
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;
  ~Streams() {
    if (!joined_)
      for (int i = 1; i < count_; ++i)
        if (Event end; end.record(streams_[i].stream) == cudaSuccess) end.wait(streams_[0].stream);
  }

  void use(int64_t pass) { stage_.use(streams_[pass % count_]); }
  void join() {
    joined_ = true;
    for (int i = 1; i < count_; ++i) {
      Event end;
      stage_.use(streams_[i]);
      stage_.record(end);
      stage_.use(streams_[0]);
      stage_.wait(end);
    }
  }

 private:
  Stage& stage_;
  const CudaStream* streams_;
  int count_;
  Event begin_;
  bool joined_ = false;
};

template <class Pass>
void run_passes(const CudaCall& call, const typename Pass::Args* args, int count, bool chained) {
  const Subject subject = Subject::of(call.cell, args[0]);
  Arena arena(call.room);
  Passes<Pass> passes = passes_of<Pass>(args, count, call.choice, arena);
  Stage stage(call.blas, subject, call.choice.launch, call.streams[0]);
  Streams streams(stage, call.streams, std::min(count, call.choice.streams));
  const auto use = [&](int64_t pass) { streams.use(pass); };
  if (chained)
    run_chained(stage, passes, use);
  else
    run_beside(stage, passes, use);
  for (int i = 0; i < count; ++i) {
    use(i);
    passes[i].end(stage);
  }
  streams.join();
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
