// A device that says it is a GPU, for a build of torch without CUDA: a guard whose streams and events do nothing, hooks
// that say the device exists, and an allocator of page-locked memory that remembers its blocks, so that `is_pinned()`
// tells the truth, and that can be given a limit as WSL2 has one.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>

namespace {

std::mutex lock;
std::map<const char*, size_t> blocks;
size_t locked = 0;
size_t limit = std::numeric_limits<size_t>::max();

struct PinnedAllocator final : c10::Allocator {
  static void release(void* pointer) {
    {
      std::lock_guard<std::mutex> guard(lock);
      auto block = blocks.find(static_cast<const char*>(pointer));
      locked -= block->second;
      blocks.erase(block);
    }
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    std::lock_guard<std::mutex> guard(lock);
    TORCH_CHECK(
        locked + bytes <= limit,
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call");
    void* pointer = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (pointer) {
      blocks[static_cast<const char*>(pointer)] = bytes;
      locked += bytes;
    }
    return {pointer, pointer, pointer ? &release : nullptr, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};
PinnedAllocator allocator;

struct PretendHooks : at::CUDAHooksInterface {
  explicit PretendHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 0; }  // no generator to seed
  c10::Allocator* getPinnedMemoryAllocator() const override { return &allocator; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> guard(lock);
    auto after = blocks.upper_bound(static_cast<const char*>(data));
    if (after == blocks.begin()) return false;
    --after;
    return static_cast<const char*>(data) < after->first + after->second;
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Stream stream() const {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0));
  }
  c10::Device exchangeDevice(c10::Device) const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
Guard guard;

}  // namespace

namespace at {
// Preferred, so that it also comes before the hooks of a build with CUDA.
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, PretendHooks)
}  // namespace at

extern "C" int pretend_register() {
  constexpr auto index = static_cast<size_t>(c10::DeviceType::CUDA);
  c10::impl::device_guard_impl_registry[index].store(&guard);
  return at::detail::getCUDAHooks().hasCUDA() ? 1 : 0;
}

extern "C" void pretend_limit_pinned(size_t bytes) {
  std::lock_guard<std::mutex> held(lock);
  limit = bytes;
}
