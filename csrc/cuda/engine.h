// The CUDA engine as the bindings see it: sizes of the room it needs, and the calls. Nothing
// here allocates, synchronises, or keeps anything between calls.
#pragma once

#include "../core/args.h"
#include "../core/batch_norm_args.h"
#include "../core/choose_cuda.h"
#include "../core/scan_args.h"
#include "blas.h"

namespace rnnfast {

// A stream, and room for cuBLAS. Null: what the handle has, which is right for one stream; several
// at the same time need one each, or their products would share it.
struct CudaStream {
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// What a call is given beside its passes. streams[0] is the caller's, with which the others are
// joined at both ends; `room` are room_of's bytes on the device.
struct CudaCall {
  int cell;
  CudaChoice choice;
  Blas blas;
  const CudaStream* streams;
  char* room;
};

// `count` passes: one, the directions of a layer, or (`chained`) layers; of backward from the last
// to the first.
template <class scalar_t>
int64_t forward_room(int cell, const CudaChoice& choice, const ForwardArgs<scalar_t>* passes,
                     int count);
template <class scalar_t>
int64_t backward_room(int cell, const CudaChoice& choice, const BackwardArgs<scalar_t>* passes,
                      int count);
template <class scalar_t>
void cuda_forward(const CudaCall& call, const ForwardArgs<scalar_t>* passes, int count,
                  bool chained);
template <class scalar_t>
void cuda_backward(const CudaCall& call, const BackwardArgs<scalar_t>* passes, int count,
                   bool chained);

// The same four of one cell: what a table of cells holds.
template <class scalar_t>
struct CellCalls {
  int64_t (*forward_room)(const CudaChoice&, const ForwardArgs<scalar_t>*, int count);
  int64_t (*backward_room)(const CudaChoice&, const BackwardArgs<scalar_t>*, int count);
  void (*forward)(const CudaCall&, const ForwardArgs<scalar_t>*, int count, bool chained);
  void (*backward)(const CudaCall&, const BackwardArgs<scalar_t>*, int count, bool chained);
};

// The LSTM with recurrent batch normalisation, of float and double; x, dy and all states without
// gaps between rows.
template <class scalar_t>
int64_t batch_norm_room(const CudaChoice& choice, const BatchNormArgs<scalar_t>& args);
template <class scalar_t>
int64_t batch_norm_room(const CudaChoice& choice, const BatchNormBackwardArgs<scalar_t>& args);
template <class scalar_t>
void cuda_batch_norm(const CudaCall& call, const BatchNormArgs<scalar_t>& args);
template <class scalar_t>
void cuda_batch_norm(const CudaCall& call, const BatchNormBackwardArgs<scalar_t>& args);

// Scans of at least one step, row and column; room as above.
template <class scalar_t>
int64_t scan_room(const ScanArgs<scalar_t>& args);
template <class scalar_t>
int64_t scan_room(const ScanBackwardArgs<scalar_t>& args);
template <class scalar_t>
void cuda_scan(const ScanArgs<scalar_t>& args, cudaStream_t stream, char* room);
template <class scalar_t>
void cuda_scan(const ScanBackwardArgs<scalar_t>& args, cudaStream_t stream, char* room);

}  // namespace rnnfast
