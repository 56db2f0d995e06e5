#include "guard.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_fused_sgd.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/utils/grad_layout_contract.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/cuda/nccl.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <atomic>
#include <cstring>
#include <typeinfo>

using c10::intrusive_ptr;
using c10::make_intrusive;
using std::chrono::milliseconds;

struct c10d_store {
  intrusive_ptr<c10d::Store> it;
};
struct c10d_group {
  intrusive_ptr<c10d::ProcessGroup> it;
};
struct c10d_work {
  intrusive_ptr<c10d::Work> it;
  // c10d reads and writes them until the work is done.
  std::vector<at::Tensor> tensors;
};
struct c10d_reducer {
  // Before the reducer, so that they outlive it: their hooks point into it.
  std::vector<at::Tensor> parameters;
  // When the last gradient was there: on the CPU the time, on a GPU the place in its stream.
  std::atomic<std::chrono::steady_clock::rep> ready{0};
  std::optional<c10::Event> event;
  // Which pointer holds a node is another one with each libtorch.
  using Node = decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));
  std::vector<std::pair<Node, uintptr_t>> hooks;
  std::shared_ptr<c10d::Reducer> it;

  void watch() {
    using torch::autograd::variable_list;
    if (!parameters.empty() && parameters[0].is_cuda()) event.emplace(at::kCUDA);
    for (auto& parameter : parameters) {
      auto node = torch::autograd::impl::grad_accumulator(parameter);
      auto hook = [this](const variable_list& outputs, const variable_list&) {
        if (event)
          event->record(c10::impl::VirtualGuardImpl(at::kCUDA).getStream(parameters[0].device()));
        else
          ready = std::chrono::steady_clock::now().time_since_epoch().count();
        return outputs;
      };
      auto key = node->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(std::move(hook)));
      hooks.emplace_back(std::move(node), key);
    }
  }

  ~c10d_reducer() {
    it.reset();
    for (auto& [node, key] : hooks) node->del_post_hook(key);
  }
};
struct c10d_event {
  c10::Event it;
};
struct c10d_copied {
  c10::Event behind;
  std::vector<at::Tensor> tensors;
};

namespace {

at::Tensor tensor(c10d_tensor t) {
  return *static_cast<const at::Tensor*>(t);
}

std::vector<at::Tensor> list(const c10d_tensor* t, size_t count) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; i++) tensors.push_back(tensor(t[i]));
  return tensors;
}

// ProcessGroupGloo has no abort of its own: what waits for a peer that hangs would wait until its timeout.
class Gloo : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;

  void abort() override {
    for (auto& context : contexts_) {
      for (int rank = 0; rank < getSize(); rank++) {
        auto* pair = context->getPair(rank).get();
        // By name, because only the declaration is ours. Another transport than TCP falls back to closing below.
        if (pair && !strcmp(typeid(*pair).name(), "N4gloo9transport3tcp4PairE"))
          reinterpret_cast<gloo::transport::tcp::Pair*>(pair)->signalExceptionExternal("aborted");
      }
      context->closeConnections();
    }
  }
};

// Sends gradients as numbers of half the size: c10d's FP16CompressCommHook, for either kind.
class Compress : public c10d::CppCommHookInterface<intrusive_ptr<c10d::ProcessGroup>> {
 public:
  Compress(intrusive_ptr<c10d::ProcessGroup> group, at::ScalarType kind) : CppCommHookInterface(std::move(group)), kind(kind) {}

  intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    // Divided first, so that the sum does not overflow.
    std::vector<at::Tensor> small{bucket.getBufferRef().to(kind).div_(state_->getSize())};
    auto sum = state_->allreduce(small)->getFuture();
    auto restore = [full = bucket.getBufferRef()](c10::ivalue::Future& sum) {
      full.copy_(sum.value().toTensorVector()[0]);
      return c10::IValue(full);
    };
    return sum->then(restore, sum->elementType());
  }

 private:
  at::ScalarType kind;
};

#ifdef USE_C10D_NCCL
// NCCL's structs lie inside libtorch's and grow with its version: with another header than libtorch's they would be misread. This is what
// libtorch was compiled with; what is loaded may be newer.
void check_nccl() {
  constexpr uint64_t ours = static_cast<uint64_t>(NCCL_MAJOR) << 32 | NCCL_MINOR << 16 | NCCL_PATCH;
  auto theirs = torch::cuda::nccl::version();
  auto text = [](uint64_t of) {
    return std::to_string(of >> 32) + '.' + std::to_string(of >> 16 & 0xffff) + '.' + std::to_string(of & 0xffff);
  };
  TORCH_CHECK(ours == theirs, "this program was compiled for NCCL ", text(ours), ", and the libtorch that it runs with for ", text(theirs),
              ": run it with the libtorch that it was built with");
}
#endif

// How often no memory was left for what nobody needed.
std::atomic<int64_t> done_without{0};

at::ScalarType half_type(int kind) {
  return kind == 1 ? at::kHalf : at::kBFloat16;
}

} // namespace

extern "C" {

void c10d_free_message(char* message) {
  free(message);
}

c10d_result c10d_store_serve(const char* host, uint16_t port, int listener, c10d_store** out) {
  return guard([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = true;
    options.waitWorkers = false;
    options.masterListenFd = listener;
    *out = new c10d_store{make_intrusive<c10d::TCPStore>(host, options)};
  });
}

c10d_result c10d_store_connect(const char* host, uint16_t port, int64_t timeout_ms, c10d_store** out) {
  return guard([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    *out = new c10d_store{make_intrusive<c10d::TCPStore>(host, options)};
  });
}

void c10d_store_free(c10d_store* store) {
  drop(guard([&] { delete store; }));
}

c10d_result c10d_group_new(c10d_store* store, int rank, int world, int64_t timeout_ms, const char* address, int cuda, c10d_group** out) {
  return guard([&] {
    using c10d::ProcessGroup;
    auto group = make_intrusive<ProcessGroup>(store->it, rank, world);
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
    intrusive_ptr<c10d::Backend> gloo = make_intrusive<Gloo>(make_intrusive<c10d::PrefixStore>("gloo", store->it), rank, world, options);
    group->setBackend(c10::kCPU, ProcessGroup::BackendType::GLOO, gloo);
    group->setDefaultBackend(ProcessGroup::BackendType::GLOO);
    if (cuda >= 0) {
#ifdef USE_C10D_NCCL
      check_nccl();
      auto nccl_options = c10d::ProcessGroupNCCL::Options::create();
      nccl_options->timeout = milliseconds(timeout_ms);
      intrusive_ptr<c10d::Backend> nccl =
          make_intrusive<c10d::ProcessGroupNCCL>(make_intrusive<c10d::PrefixStore>("nccl", store->it), rank, world, nccl_options);
      group->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda)));
      group->setBackend(c10::kCUDA, ProcessGroup::BackendType::NCCL, nccl);
      group->setDefaultBackend(ProcessGroup::BackendType::NCCL);
#endif
    }
    group->setGroupName("ranks");
    *out = new c10d_group{group};
  });
}

c10d_result c10d_group_abort(c10d_group* group) {
  return guard([&] { group->it->abort(); });
}

void c10d_group_free(c10d_group* group) {
  drop(guard([&] { delete group; }));
}

c10d_result c10d_all_reduce(c10d_group* group, c10d_tensor t, int op, c10d_work** out) {
  return guard([&] {
    std::vector<at::Tensor> tensors{tensor(t)};
    c10d::AllreduceOptions options;
    options.reduceOp = op == 0 ? c10d::ReduceOp::SUM : c10d::ReduceOp::MAX;
    auto work = group->it->allreduce(tensors, options);
    *out = new c10d_work{work, tensors};
  });
}

c10d_result c10d_broadcast(c10d_group* group, const c10d_tensor* t, size_t count, int root) {
  return guard([&] {
    auto tensors = list(t, count);
    for (auto& tensor : tensors) tensor = tensor.detach();
    c10d::broadcast_coalesced(group->it, tensors, 64 << 20, root);
  });
}

c10d_result c10d_work_wait(c10d_work* work, int64_t timeout_ms) {
  return guard([&] {
    // With a timeout NCCL's wait would hold up the host, and look once a millisecond.
    if (work->tensors[0].is_cuda()) return work->it->synchronize();
    try {
      if (!work->it->wait(milliseconds(timeout_ms))) C10D_THROW_ERROR(DistNetworkError, "the collective was aborted");
    } catch (...) {
      // The wait has ended, not the collective.
      if (!work->it->isCompleted()) C10D_THROW_ERROR(TimeoutError, "a peer did not answer");
      throw;
    }
  });
}

void c10d_work_free(c10d_work* work) {
  drop(guard([&] { delete work; }));
}

c10d_result c10d_reducer_new(c10d_group* group, const c10d_tensor* t, size_t count, int64_t first_bucket_bytes, int64_t bucket_bytes, int compress, c10d_reducer** out) {
  return guard([&] {
    auto owner = std::make_unique<c10d_reducer>();
    owner->parameters = list(t, count);
    // Before the reducer's own hooks, the last of which starts the last bucket.
    owner->watch();
    // A rank alone has nothing to average: its gradients stay where backward makes them, without a pass through buckets.
    if (group->it->getSize() > 1) {
      auto& parameters = owner->parameters;
      c10d::verify_params_across_processes(group->it, parameters, std::nullopt);
      std::vector<bool> sparse(count, false);
      // One bucket for the first step, as DistributedDataParallel does: it shows in which order gradients become ready, and the
      // reducer then cuts its buckets in that order.
      auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(parameters, {static_cast<size_t>(INT64_MAX)}, sparse));
      owner->it = std::make_shared<c10d::Reducer>(
          parameters, buckets, group->it, sparse, bucket_bytes, /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true,
          std::unordered_map<size_t, std::string>(), first_bucket_bytes, /*skip_all_reduce_unused_params=*/false,
          /*use_python_reducer=*/false, std::vector<int64_t>());
      if (compress) owner->it->register_comm_hook(std::make_unique<Compress>(group->it, half_type(compress)));
    }
    *out = owner.release();
  });
}

c10d_result c10d_reducer_begin(c10d_reducer* reducer) {
  return guard([&] {
    for (auto& parameter : reducer->parameters) parameter.mutable_grad().reset();
  });
}

c10d_result c10d_reducer_prepare(c10d_reducer* reducer) {
  return guard([&] {
    if (!reducer->it) return;
    reducer->it->prepare_for_forward();
    reducer->it->rebuild_buckets();
    reducer->it->prepare_for_backward({});
  });
}

c10d_result c10d_backward(c10d_tensor loss) {
  return guard([&] { tensor(loss).backward(); });
}

c10d_result c10d_reducer_ready(c10d_reducer* reducer, int* reached, int64_t* ago_ns) {
  return guard([&] {
    using namespace std::chrono;
    *reached = !reducer->event || reducer->event->query();
    auto ready = steady_clock::time_point(steady_clock::duration(reducer->ready.load()));
    *ago_ns = reducer->event ? 0 : duration_cast<nanoseconds>(steady_clock::now() - ready).count();
  });
}

c10d_result c10d_reducer_buckets(c10d_reducer* reducer, size_t* out) {
  return guard([&] { *out = reducer->it ? reducer->it->get_grad_buckets().size() : 0; });
}

void c10d_reducer_free(c10d_reducer* reducer) {
  drop(guard([&] { delete reducer; }));
}

c10d_result c10d_gradients(c10d_tensor output, c10d_tensor by, const c10d_tensor* t, size_t count, void** out) {
  return guard([&] {
    namespace utils = torch::autograd::utils;
    auto leaves = list(t, count);
    auto factors = by ? list(&by, 1) : std::vector<at::Tensor>();
    auto gradients = torch::autograd::grad({tensor(output)}, leaves, factors);
    // As autograd does for a gradient that it accumulates.
    for (size_t i = 0; i < count; i++)
      if (!utils::obeys_layout_contract(gradients[i], leaves[i])) gradients[i] = utils::clone_obey_contract(gradients[i], leaves[i]);
    for (size_t i = 0; i < count; i++) out[i] = new at::Tensor(std::move(gradients[i]));
  });
}

c10d_result c10d_set_gradients(const c10d_tensor* parameters, const c10d_tensor* gradients, size_t count) {
  return guard([&] {
    for (size_t i = 0; i < count; i++) tensor(parameters[i]).mutable_grad() = tensor(gradients[i]);
  });
}

c10d_result c10d_event_record(int cuda, int timed, c10d_event** out) {
  return guard([&] {
    at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda));
    c10::Event event(at::kCUDA, timed ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT);
    event.record(c10::impl::VirtualGuardImpl(at::kCUDA).getStream(device));
    *out = new c10d_event{std::move(event)};
  });
}

c10d_result c10d_event_reached(c10d_event* event, int* out) {
  return guard([&] { *out = event->it.query(); });
}

c10d_result c10d_event_elapsed(c10d_event* event, c10d_event* later, double* out) {
  return guard([&] { *out = event->it.elapsedTime(later->it); });
}

void c10d_event_free(c10d_event* event) {
  drop(guard([&] { delete event; }));
}

c10d_result c10d_out_of_memory(int cuda, int64_t* out) {
  return guard([&] {
    auto all = c10::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(cuda)).num_ooms;
    *out = all - done_without;
  });
}

c10d_result c10d_empty_pinned(const int64_t* shape, size_t dimensions, void** out) {
  return guard([&] {
    auto options = at::TensorOptions().dtype(at::kByte).pinned_memory(true);
    *out = new at::Tensor(at::empty(at::IntArrayRef(shape, dimensions), options));
  });
}

c10d_result c10d_empty_cuda(int cuda, int64_t bytes, int64_t spare, void** out) {
  return guard([&] {
    *out = nullptr;
    auto index = static_cast<c10::DeviceIndex>(cuda);
    auto* allocator = c10::getDeviceAllocator(at::kCUDA);
    if (static_cast<int64_t>(allocator->getMemoryInfo(index).first) - spare < bytes) return;
    auto options = at::TensorOptions().dtype(at::kByte).device(at::Device(at::kCUDA, index));
    try {
      *out = new at::Tensor(at::empty({bytes}, options));
    } catch (const c10::OutOfMemoryError&) {
      done_without++;
    }
  });
}

c10d_result c10d_copy_stream(int cuda, int64_t* out) {
  return guard([&] {
    at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda));
    // NCCL takes its streams, one for each group, from the pool of the other priority: this one is never among them.
    *out = c10::impl::VirtualGuardImpl(at::kCUDA).getStreamFromGlobalPool(device, /*isHighPriority=*/true).id();
  });
}

c10d_result c10d_copy(int cuda, int64_t stream, const c10d_tensor* t, size_t count, void** tensors, c10d_copied** out) {
  return guard([&] {
    at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda));
    c10::Stream beside(c10::Stream::UNSAFE, device, stream);
    auto copied = std::make_unique<c10d_copied>(c10d_copied{c10::Event(at::kCUDA), {}});
    {
      // Under the guard three things are this stream's: the new memory, which the allocator otherwise would take from what the computing
      // stream has freed but may still be using; the copy; and the mark by which the host's allocator knows when the copy has read its
      // memory (copy_ tells it the current stream, CachingHostAllocator.h: record_event).
      c10::StreamGuard on(beside);
      for (auto& host : list(t, count)) {
        auto copy = at::empty(host.sizes(), host.options().device(device).pinned_memory(false));
        copied->tensors.push_back(copy.copy_(host, /*non_blocking=*/true));
      }
      copied->behind.record(beside);
    }
    std::vector<std::unique_ptr<at::Tensor>> given;
    for (auto& tensor : copied->tensors) given.push_back(std::make_unique<at::Tensor>(tensor));
    for (size_t i = 0; i < count; i++) tensors[i] = given[i].release();
    *out = copied.release();
  });
}

c10d_result c10d_copied_wait(c10d_copied* copied) {
  return guard([&] {
    c10::impl::VirtualGuardImpl impl(at::kCUDA);
    auto current = impl.getStream(copied->behind.device());
    copied->behind.block(current);
    for (auto& tensor : copied->tensors) impl.recordDataPtrOnStream(tensor.storage().data_ptr(), current);
  });
}

void c10d_copied_free(c10d_copied* copied) {
  drop(guard([&] { delete copied; }));
}

c10d_result c10d_allow_tf32(int allow) {
  return guard([&] { at::globalContext().setAllowTF32CuBLAS(allow != 0); });
}

c10d_result c10d_allows_tf32(int* out) {
  return guard([&] { *out = at::globalContext().allowTF32CuBLAS(); });
}

c10d_result c10d_allow_tf32_convolutions(int allow) {
  return guard([&] { at::globalContext().setAllowTF32CuDNN(allow != 0); });
}

c10d_result c10d_allow_bf16_sums(int allow) {
  return guard([&] { at::globalContext().setAllowBF16ReductionCuBLAS(allow != 0); });
}

c10d_result c10d_allows_bf16_sums(int* out) {
  return guard([&] {
    using at::CuBLASReductionOption;
    *out = at::globalContext().allowBF16ReductionCuBLAS() == CuBLASReductionOption::AllowReducedPrecisionWithSplitK;
  });
}

c10d_result c10d_autocast(int cuda, int kind) {
  return guard([&] {
    auto device = cuda ? at::kCUDA : at::kCPU;
    if (kind) {
      at::autocast::increment_nesting();
      at::autocast::set_autocast_dtype(device, half_type(kind));
    } else if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
    at::autocast::set_autocast_enabled(device, kind != 0);
  });
}

c10d_result c10d_fused_sgd(const c10d_tensor* parameters, const c10d_tensor* gradients, const c10d_tensor* momenta, size_t count,
                     double learning_rate, double momentum, double weight_decay) {
  return guard([&] {
    at::NoGradGuard no_grad;
    // Without momentum libtorch wants no momenta.
    auto p = list(parameters, count), g = list(gradients, count), m = list(momenta, momentum == 0 ? 0 : count);
    at::_fused_sgd_(p, g, m, weight_decay, momentum, learning_rate, /*dampening=*/0.0, /*nesterov=*/false, /*maximize=*/false,
                    /*is_first_step=*/false);
  });
}

} // extern "C"
