// CUDA graphs: what a device is given once is recorded, and it does that as often as it is told.
#include "guard.h"

#ifdef USE_C10D_NCCL
#include <ATen/autocast_mode.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>

using c10::cuda::CUDAStream;

struct c10d_recorder {
  CUDAStream own;
  // Of all its graphs: they are replayed one after the other.
  decltype(at::cuda::graph_pool_handle()) pool = at::cuda::graph_pool_handle();
  std::optional<CUDAStream> left;
};
// Its methods mean the current device's stream. CUDAGuard would need CUDA's own runtime to link.
struct c10d_graph {
  c10::Device device;
  at::cuda::CUDAGraph it;
};

namespace {

// What `next` is given from now on comes after all that `first` was given.
void order(CUDAStream first, CUDAStream next) {
  c10::Event given(at::kCUDA);
  given.record(first.unwrap());
  given.block(next.unwrap());
}

} // namespace

extern "C" {

c10d_result c10d_recorder_new(int cuda, c10d_recorder** out) {
  return guard([&] { *out = new c10d_recorder{c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(cuda))}; });
}

c10d_result c10d_recorder_enter(c10d_recorder* recorder) {
  return guard([&] {
    recorder->left = c10::cuda::getCurrentCUDAStream(recorder->own.device_index());
    order(*recorder->left, recorder->own);
    c10::cuda::setCurrentCUDAStream(recorder->own);
  });
}

c10d_result c10d_recorder_leave(c10d_recorder* recorder) {
  return guard([&] {
    // First, so that whatever comes of the order, this thread does not stay there.
    c10::cuda::setCurrentCUDAStream(*recorder->left);
    order(recorder->own, *recorder->left);
  });
}

c10d_result c10d_graph_begin(c10d_recorder* recorder, c10d_graph** out) {
  return guard([&] {
    // A graph's memory is its own. That in which the same was computed until now is left to others.
    c10::cuda::CUDACachingAllocator::emptyCache();
    c10::DeviceGuard device(recorder->own.device());
    auto graph = std::unique_ptr<c10d_graph>(new c10d_graph{recorder->own.device()});
    // Only this thread is kept from what cannot be recorded: others go on bringing data to the device.
    graph->it.capture_begin(recorder->pool, cudaStreamCaptureModeThreadLocal);
    // What was cast before is not for a graph, nor what is cast in it for others.
    at::autocast::set_autocast_cache_enabled(false);
    *out = graph.release();
  });
}

c10d_result c10d_graph_end(c10d_graph* graph) {
  return guard([&] {
    at::autocast::set_autocast_cache_enabled(true);
    c10::DeviceGuard device(graph->device);
    graph->it.capture_end();
  });
}

c10d_result c10d_graph_replay(c10d_graph* graph) {
  return guard([&] {
    c10::DeviceGuard device(graph->device);
    graph->it.replay();
  });
}

#else

struct c10d_recorder {};
struct c10d_graph {};

namespace {

c10d_result none() {
  return failure(C10D_HERE, "built without NCCL, and so without CUDA graphs");
}

} // namespace

extern "C" {

c10d_result c10d_recorder_new(int, c10d_recorder**) {
  return none();
}

c10d_result c10d_recorder_enter(c10d_recorder*) {
  return none();
}

c10d_result c10d_recorder_leave(c10d_recorder*) {
  return none();
}

c10d_result c10d_graph_begin(c10d_recorder*, c10d_graph**) {
  return none();
}

c10d_result c10d_graph_end(c10d_graph*) {
  return none();
}

c10d_result c10d_graph_replay(c10d_graph*) {
  return none();
}

#endif

void c10d_recorder_free(c10d_recorder* recorder) {
  drop(guard([&] { delete recorder; }));
}

void c10d_graph_free(c10d_graph* graph) {
  drop(guard([&] { delete graph; }));
}

} // extern "C"
