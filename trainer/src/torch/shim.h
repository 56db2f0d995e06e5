// The part of libtorch's c10d that tch does not bind, as C functions. Called through ffi.rs alone.
//
// Every function that can fail returns what became of it: no exception leaves this file. `out` is written on success only. Tensors are
// borrowed at::Tensor pointers, as tch::Tensor::as_ptr gives them; one that is made is owned by the caller.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {
typedef struct c10d_store c10d_store;
typedef struct c10d_group c10d_group;
typedef struct c10d_work c10d_work;
typedef struct c10d_reducer c10d_reducer;
typedef struct c10d_event c10d_event;
typedef struct c10d_copied c10d_copied;
typedef struct c10d_recorder c10d_recorder;
typedef struct c10d_graph c10d_graph;
typedef const void* c10d_tensor;

// Whose failure it is, by the type of the exception.
enum c10d_class {
  C10D_OK = 0,
  // Nobody else's: it would fail again.
  C10D_HERE = 1,
  // A peer's, or that of the way to it.
  C10D_PEER = 2,
  C10D_TIMEOUT = 3,
  // This device's: what it holds is worth nothing.
  C10D_DEVICE = 4,
  C10D_OUT_OF_MEMORY = 5,
};
typedef struct {
  int of;
  // For people, unless it is C10D_OK; to be freed with c10d_free_message.
  char* message;
} c10d_result;

void c10d_free_message(char* message);

// Serves a store on a listening socket, which it takes over.
c10d_result c10d_store_serve(const char* host, uint16_t port, int listener, c10d_store** out);
c10d_result c10d_store_connect(const char* host, uint16_t port, int64_t timeout_ms, c10d_store** out);
void c10d_store_free(c10d_store* store);

// Blocks until all ranks have come. `address` is this rank's own, for gloo; `cuda` its device for NCCL, or -1 for gloo alone.
c10d_result c10d_group_new(c10d_store* store, int rank, int world, int64_t timeout_ms, const char* address, int cuda, c10d_group** out);
// Fails what is in flight and closes the connections. From any thread.
c10d_result c10d_group_abort(c10d_group* group);
void c10d_group_free(c10d_group* group);

// op: 0 sum, 1 maximum.
c10d_result c10d_all_reduce(c10d_group* group, c10d_tensor tensor, int op, c10d_work** out);
c10d_result c10d_broadcast(c10d_group* group, const c10d_tensor* tensors, size_t count, int root);
// Of a tensor on a GPU it does not wait: its current stream does.
c10d_result c10d_work_wait(c10d_work* work, int64_t timeout_ms);
void c10d_work_free(c10d_work* work);

// compress: 0 not, 1 to fp16, 2 to bf16.
c10d_result c10d_reducer_new(c10d_group* group, const c10d_tensor* parameters, size_t count, int64_t first_bucket_bytes, int64_t bucket_bytes, int compress, c10d_reducer** out);
// Drops the gradients of the step before.
c10d_result c10d_reducer_begin(c10d_reducer* reducer);
// To be called before the step's last backward, the one that reduces.
c10d_result c10d_reducer_prepare(c10d_reducer* reducer);
// Adds the gradients of a loss to those of its parameters. Here, because tch hides what failed.
c10d_result c10d_backward(c10d_tensor loss);
// Whether the device has computed all gradients of that backward, and on the CPU how long ago that was.
c10d_result c10d_reducer_ready(c10d_reducer* reducer, int* reached, int64_t* ago_ns);
c10d_result c10d_reducer_buckets(c10d_reducer* reducer, size_t* out);
void c10d_reducer_free(c10d_reducer* reducer);

// The gradients of `output`, times `by` unless that is null, by these leaves: new tensors that lie as the leaves do. The gradients that
// tensors have of their own stay what they are, and no hook hears of it.
c10d_result c10d_gradients(c10d_tensor output, c10d_tensor by, const c10d_tensor* leaves, size_t count, void** out);
// Makes them the gradients of these parameters.
c10d_result c10d_set_gradients(const c10d_tensor* parameters, const c10d_tensor* gradients, size_t count);

// A stream of a CUDA device's own, on which work is recorded, and the memory of what is. Builds without NCCL have none.
c10d_result c10d_recorder_new(int cuda, c10d_recorder** out);
void c10d_recorder_free(c10d_recorder* recorder);
// What this thread gives the device from now on goes to that stream, after all that it has given before ...
c10d_result c10d_recorder_enter(c10d_recorder* recorder);
// ... and no more: what comes now comes after that.
c10d_result c10d_recorder_leave(c10d_recorder* recorder);
// In there: what the device is given from now on it does not do, but it is recorded ...
c10d_result c10d_graph_begin(c10d_recorder* recorder, c10d_graph** out);
// ... up to here. To be called once, also if what was to be recorded has failed.
c10d_result c10d_graph_end(c10d_graph* graph);
// Has the device do it, on this thread's stream.
c10d_result c10d_graph_replay(c10d_graph* graph);
void c10d_graph_free(c10d_graph* graph);

// Marks the place that a CUDA device's current stream has come to; if `timed`, the device notes when it comes there.
c10d_result c10d_event_record(int cuda, int timed, c10d_event** out);
c10d_result c10d_event_reached(c10d_event* event, int* out);
// Milliseconds between two timed ones that have both been reached.
c10d_result c10d_event_elapsed(c10d_event* event, c10d_event* later, double* out);
void c10d_event_free(c10d_event* event);

// How often a CUDA device had no memory left for a tensor.
c10d_result c10d_out_of_memory(int cuda, int64_t* out);

// A new tensor of bytes on the CPU, not filled, in memory from which a CUDA device copies by itself. libtorch keeps such memory for the
// next one, until the device has copied.
c10d_result c10d_empty_pinned(const int64_t* shape, size_t dimensions, void** out);

// A new tensor of so many bytes on a CUDA device, not filled; null if the device would not have `spare` bytes left beside it. That it has
// none for this one is not counted above.
c10d_result c10d_empty_cuda(int cuda, int64_t bytes, int64_t spare, void** out);

// A stream of a CUDA device for copies, beside the one that computes.
c10d_result c10d_copy_stream(int cuda, int64_t* out);
// Has that stream copy tensors from memory of c10d_empty_pinned to as many new ones on the device, and marks the place behind them. The
// host need not wait, nor keep its tensors.
c10d_result c10d_copy(int cuda, int64_t stream, const c10d_tensor* host, size_t count, void** tensors, c10d_copied** out);
// The device's current stream waits at this place until the copies are made. Their memory is given to nobody until that stream has done
// all that it will have been given when they are freed.
c10d_result c10d_copied_wait(c10d_copied* copied);
void c10d_copied_free(c10d_copied* copied);

// Whether matrix products of f32 on GPUs compute in TF32 from now on, in this process.
c10d_result c10d_allow_tf32(int allow);
c10d_result c10d_allows_tf32(int* out);
// Whether convolutions of f32 on GPUs do. libtorch lets them.
c10d_result c10d_allow_tf32_convolutions(int allow);
// Whether sums of bf16 products of GPUs may be of bf16, too.
c10d_result c10d_allow_bf16_sums(int allow);
c10d_result c10d_allows_bf16_sums(int* out);

// On this thread operations that gain by it compute in a smaller kind from now on (1 fp16, 2 bf16), or no more (0).
c10d_result c10d_autocast(int cuda, int kind);

c10d_result c10d_fused_sgd(const c10d_tensor* parameters, const c10d_tensor* gradients, const c10d_tensor* momenta, size_t count,
                     double learning_rate, double momentum, double weight_decay);
}
