// A device that PyTorch dispatches to under the name `npu`, without the hardware: PrivateUse1 with its memory on the host.
//
// Every operator without a kernel here goes to `on_host`, which shows the CPU kernel the same memory under the CPU's
// name, so nothing is copied. Like a card it refuses tensors left on the host, float64 and shapes that depend on
// values; it counts operators, copies and the times at which the host would have to wait.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>
#include <torch/version.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

// The lines of PyTorch differ in what an allocator, a guard and the hooks have to offer: what stands here without
// `override`, or twice, const and not, is asked for by some of them alone. The rest of it:
#define TORCH_AT_LEAST(minor) (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= minor)

namespace {

#if TORCH_AT_LEAST(5)
using std::nullopt;
template <class T> using optional = std::optional<T>;
#else
using c10::nullopt;
template <class T> using optional = c10::optional<T>;
#endif

constexpr auto NPU = c10::DeviceType::PrivateUse1;

// ------------------------------------------------------------------------------------------------------- counters

std::mutex mutex;
std::map<std::string, int64_t> operators;
std::atomic<int64_t> syncs{0}, to_device{0}, to_host{0}, bytes{0}, peak{0};

void note_operator(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex);
  ++operators[name];
}

// --------------------------------------------------------------------------------------------------------- memory

thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex device_count() {
  const char* text = std::getenv("NPU_DOUBLE_COUNT");
  return text ? std::atoi(text) : 1;
}

struct Block {  // what an npu storage holds: its own memory, or the storage that a CPU kernel made
  void* memory;
  c10::Storage lender;
  size_t size;
};

c10::DataPtr hand_out(Block* block, void* data, c10::Device device) {
  int64_t now = bytes += block->size, seen = peak;
  while (now > seen && !peak.compare_exchange_weak(seen, now)) {
  }
  auto release = [](void* context) {
    auto* block = static_cast<Block*>(context);
    bytes -= block->size;
    std::free(block->memory);
    delete block;
  };
  return {data, block, release, device};
}

struct NpuAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) { return std::as_const(*this).allocate(size); }
  c10::DataPtr allocate(size_t size) const {
    c10::Device device(NPU, current);
    if (size == 0) {
      return {nullptr, device};
    }
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, 64, size) == 0, "npu out of memory");
    return hand_out(new Block{memory, {}, size}, memory, device);
  }
  void copy_data(void* target, const void* source, size_t size) const {
    std::memcpy(target, source, size);
  }
};
NpuAllocator allocator;
REGISTER_ALLOCATOR(NPU, &allocator);

std::set<const void*> pinned;

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) { return std::as_const(*this).allocate(size); }
  c10::DataPtr allocate(size_t size) const {
    void* memory = std::malloc(size ? size : 1);
    std::lock_guard<std::mutex> lock(mutex);
    pinned.insert(memory);
    auto release = [](void* memory) {
      std::lock_guard<std::mutex> lock(mutex);
      pinned.erase(memory);
      std::free(memory);
    };
    return {memory, memory, release, c10::Device(c10::kCPU)};
  }
  void copy_data(void* target, const void* source, size_t size) const {
    std::memcpy(target, source, size);
  }
};
PinnedAllocator pinned_allocator;

// --------------------------------------------------------------------------------------------------- device, hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device old = getDevice();
    if (device.index() >= 0) {
      setDevice(device);
    }
    return old;
  }
  c10::Device getDevice() const override { return {NPU, current}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "invalid npu device ", static_cast<int>(device.index()));
    current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { ++syncs; }
  void synchronizeEvent(void*) const { ++syncs; }
  void synchronizeDevice(const c10::DeviceIndex) const { ++syncs; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }
  bool isAvailable() const { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  c10::DeviceIndex deviceCount() const { return device_count(); }
  void setCurrentDevice(c10::DeviceIndex device) const { current = device; }
  c10::DeviceIndex getCurrentDevice() const { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const { return std::exchange(current, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const { return exchangeDevice(device); }
  at::Device getDeviceFromPtr(void*) const { return {NPU, current}; }
  bool isPinnedPtr(const void* data) const {
    std::lock_guard<std::mutex> lock(mutex);
    return pinned.count(data) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const { return &pinned_allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex card) { return std::as_const(*this).getDefaultGenerator(card); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const {
    static at::Generator generator = at::globalContext().defaultGenerator(c10::kCPU);
    return generator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const {
    auto data = allocator.allocate(size);
    std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};
Hooks hooks;

// ------------------------------------------------------------------------------- the same memory under both names

bool on_npu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == NPU; }

void refuse_double(c10::ScalarType type) {
  TORCH_CHECK(type != at::kDouble && type != at::kComplexDouble, "an NPU has no float64");
}

at::Tensor with_storage(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

at::Tensor host_view(const at::Tensor& tensor) {
  if (!on_npu(tensor)) {
    return tensor;
  }
  auto* owner = new c10::Storage(tensor.storage());
  c10::DataPtr data(owner->mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), c10::GetAllocator(c10::kCPU), true);
  return with_storage(std::move(storage), c10::DispatchKey::CPU, tensor);
}

at::Tensor adopt(const at::Tensor& host, c10::Device device) {  // a CPU kernel's result becomes an npu tensor
  refuse_double(host.scalar_type());
  auto lender = host.storage();
  void* memory = lender.mutable_data();
  size_t size = lender.nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), size,
                       hand_out(new Block{nullptr, std::move(lender), size}, memory, device), &allocator, true);
  return with_storage(std::move(storage), c10::DispatchKey::PrivateUse1, host);
}

// -------------------------------------------------------------------------------------------------------- kernels

at::Tensor empty(at::IntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>,
                 optional<at::Device> device, optional<bool>, optional<at::MemoryFormat> format) {
  auto dtype = c10::dtype_or_default(type);
  refuse_double(dtype);
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype, format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, optional<at::ScalarType> type,
                         optional<at::Layout>, optional<at::Device> device, optional<bool>) {
  auto dtype = c10::dtype_or_default(type);
  refuse_double(dtype);
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  if (on_npu(source) && !on_npu(target)) {
    ++to_host;
    syncs += !non_blocking;
  } else if (!on_npu(source)) {
    ++to_device;
  }
  host_view(target).copy_(host_view(source));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (needed > impl->unsafe_storage().nbytes()) {
    hooks.resizePrivateUse1Bytes(impl->unsafe_storage(), needed);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage source) {
  int64_t size = source.nbytes() / self.dtype().itemsize();
  return set_storage(self, std::move(source), 0, {size}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(on_npu(input) && on_npu(weight),
              "convolution: all tensors must be on the npu, found some on the cpu");
  note_operator("convolution_overrideable");
  optional<at::Tensor> host_bias = bias && bias->defined() ? optional<at::Tensor>(host_view(*bias)) : nullopt;
  return adopt(at::convolution(host_view(input), host_view(weight), host_bias, stride, padding, dilation, transposed,
                               output_padding, groups), input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  note_operator("convolution_backward_overrideable");
  auto out = at::convolution_backward(host_view(grad), host_view(input), host_view(weight),
                                      at::OptionalIntArrayRef(at::IntArrayRef{weight.size(0)}), stride, padding,
                                      dilation, transposed, output_padding, groups, mask);
  auto back = [&](const at::Tensor& tensor) { return tensor.defined() ? adopt(tensor, input.device()) : tensor; };
  return {back(std::get<0>(out)), back(std::get<1>(out)), back(std::get<2>(out))};
}

// ------------------------------------------------------------------------------------------- every other operator

const std::set<std::string> value_dependent = {"aten::nonzero", "aten::masked_select", "aten::_unique2",
                                               "aten::unique_dim", "aten::unique_consecutive"};

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  TORCH_CHECK(!value_dependent.count(schema.name()), name, ": the shape of its result depends on values");
  note_operator(name.substr(name.find("::") + 2));

  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // npu tensor, the same on the host
  bool left_on_host = false;
  auto convert = [&](const at::Tensor& tensor) {
    if (tensor.defined() && !on_npu(tensor)) {
      left_on_host |= tensor.dim() > 0;
      return tensor;
    }
    auto host = host_view(tensor);
    if (tensor.defined()) {
      pairs.emplace_back(tensor, host);
    }
    return host;
  };
  const size_t arguments = schema.arguments().size(), first = stack->size() - arguments;
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = convert(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(convert(tensor));
      }
      value = c10::IValue(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<optional<at::Tensor>> list;
      for (optional<at::Tensor> tensor : value.toOptionalTensorList()) {
        list.push_back(tensor ? optional<at::Tensor>(convert(*tensor)) : nullopt);
      }
      value = c10::IValue(list);
    } else if (value.isDevice() && value.toDevice().type() == NPU) {
      value = c10::Device(c10::kCPU);
    }
  }
  TORCH_CHECK(!left_on_host || pairs.empty(), name, ": all tensors must be on the npu, found some on the cpu");
  TORCH_CHECK(schema.name() != "aten::gather" || pairs[0].first.is_contiguous(), "gather of a tensor not contiguous");
  const c10::Device device = pairs.empty() ? c10::Device(NPU, current) : pairs[0].first.device();

  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [npu, host] : pairs) {  // an out= argument that the kernel has resized
    if (!npu.sizes().equals(host.sizes())) {
      npu.resize_(host.sizes());
      host_view(npu).copy_(host);
    }
  }
  auto back = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined()) {
      return tensor;
    }
    for (auto& [npu, host] : pairs) {
      if (tensor.is_same(host)) {
        return npu;
      }
      if (tensor.storage().data() == npu.storage().data() && tensor.numel()) {
        return with_storage(npu.storage(), c10::DispatchKey::PrivateUse1, tensor);
      }
    }
    return adopt(tensor, device);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(back(tensor));
      }
      value = c10::IValue(list);
    } else {
      ++syncs;  // the host reads a value
    }
  }
}

// The fused attention takes no values that are wider than the keys (op-plugin, npu_fusion_attention: Dk >= Dv).
void attention(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const auto key = arguments[1].toTensor(), value = arguments[2].toTensor();
  TORCH_CHECK(value.size(-1) <= key.size(-1), "the NPU's fused attention takes no values that are wider than the keys");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), stack);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("scaled_dot_product_attention", torch::CppFunction::makeFromBoxedFunction<&attention>());
}

// As torch_npu's own: operators without a gradient of their own, such as collectives, go on to the device. From some
// version on PyTorch brings this by itself, and there is one place for it.
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) {
  if (!c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(c10::DispatchKey::AutogradPrivateUse1)) {
    m.fallback(torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  // by itself it goes to mean.out, which on torch 2.5's CPU writes nothing in half precision
  m.impl("mean.dim", torch::CppFunction::makeFromBoxedFunction<&on_host>());
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

// ------------------------------------------------------------------------------------------------------- autocast

}  // namespace

#ifdef AT_FORALL_LOWER_PRECISION_FP
#define REGISTER_KERNEL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__)
#else
#include "autocast_lists.hpp"
#endif

namespace at::autocast {  // the macros name types of both namespaces

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) REGISTER_KERNEL(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) REGISTER_KERNEL(__VA_ARGS__, fp32)
#define SET_DTYPE(...) REGISTER_KERNEL(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) REGISTER_KERNEL(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(SET_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(PROMOTE)
}
}  // namespace at::autocast

namespace {

// ------------------------------------------------------------------------------------------------ hccl, over gloo

std::vector<at::Tensor> on_host_all(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> out;
  for (const auto& tensor : tensors) {
    out.push_back(host_view(tensor));
  }
  return out;
}

class Hccl final : public c10d::Backend {
 public:
  Hccl(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override { return "hccl"; }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override {
    auto host = on_host_all(tensors);
    return finish(gloo_->broadcast(host, options), tensors);
  }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    auto host = on_host_all(tensors);
    return finish(gloo_->allreduce(host, options), tensors);
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override {
    std::vector<std::vector<at::Tensor>> host;
    for (const auto& list : outputs) {
      host.push_back(on_host_all(list));
    }
    auto host_inputs = on_host_all(inputs);
    return finish(gloo_->allgather(host, host_inputs, options), outputs[0]);
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override {
    return gloo_->barrier(options);
  }

 private:
  static c10::intrusive_ptr<c10d::Work> finish(const c10::intrusive_ptr<c10d::Work>& work,
                                               const std::vector<at::Tensor>& tensors) {
    work->wait();
    auto future = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{tensors[0].device()});
    future->markCompleted(c10::IValue(tensors));
    return c10d::Work::create_from_future(future);
  }
  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
#if !TORCH_AT_LEAST(5)  // which leaves the switches of autocast to the package of the device
  m.def("set_autocast_enabled", &at::autocast::set_privateuseone_enabled);
  m.def("set_autocast_half", [](bool half) {
    at::autocast::set_autocast_privateuseone_dtype(half ? at::kHalf : at::kBFloat16);
  });
#endif
  m.def("device_count", [] { return static_cast<int>(device_count()); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int index) { Guard().setDevice({NPU, static_cast<c10::DeviceIndex>(index)}); });
  m.def("synchronize", [] { ++syncs; });
  m.def("max_memory_allocated", [] { return peak.load(); });
  m.def("reset_peak_memory_stats", [] { peak = bytes.load(); });
  m.def("make_hccl", [](const c10::intrusive_ptr<c10d::Backend>& gloo, int rank, int size)
            -> c10::intrusive_ptr<c10d::Backend> { return c10::make_intrusive<Hccl>(gloo, rank, size); });
  m.def("counts", [] {
    std::lock_guard<std::mutex> lock(mutex);
    return py::dict(py::arg("syncs") = syncs.load(), py::arg("to_device") = to_device.load(),
                    py::arg("to_host") = to_host.load(), py::arg("operators") = operators);
  });
  m.def("reset_counts", [] {
    std::lock_guard<std::mutex> lock(mutex);
    operators.clear();
    syncs = to_device = to_host = 0;
  });
}
