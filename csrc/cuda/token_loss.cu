// The op `mdpgrpo_fast::_cuda_token_loss_rows`: checks, the choice of a cluster, and the launch.
#define USE_CUDA  // of torch's ABI: what belongs to a stream and a device
#include <cuda_runtime.h>

#include <algorithm>

#include "hopper.cuh"
// After the primitives that it is written against.
#include "token_loss_op.h"

namespace mdpgrpo {
namespace {

// Columns of a row that one block takes: three blocks of this size fit a multiprocessor, and hide each other's waits.
constexpr int64_t SLICE_BYTES = 72 << 10;
constexpr int64_t MAX_SLICE_BYTES = 224 << 10;

template <class E, class Out, bool TWO, bool CAP, bool EXTENDED>
__global__ void __launch_bounds__(hw::THREADS, 3) token_loss_kernel(const __grid_constant__ RowArguments p) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ BlockMemory block;
  token_loss_rows<E, Out, TWO, CAP, EXTENDED>(p, memory, block);
}

void require(cudaError_t status, const char* what) {
  check(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

template <class E, class Out, bool TWO, bool CAP, bool EXTENDED>
void launch(RowArguments p, cudaStream_t stream) {
  constexpr int64_t item = sizeof(typename E::Storage);
  const auto [cluster, slice] = row_shape(p.vocab, item, SLICE_BYTES, MAX_SLICE_BYTES);
  p.slice = static_cast<int32_t>(slice / item);

  const auto kernel = token_loss_kernel<E, Out, TWO, CAP, EXTENDED>;
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(slice)),
          "shared memory");
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(hw::THREADS);
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.dynamicSmemBytes = static_cast<size_t>(slice);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int resident = 0;
  require(cudaOccupancyMaxActiveClusters(&resident, kernel, &config), "clusters");
  check(resident > 0, "no cluster of ", std::to_string(cluster), " blocks fits this device");
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(p.rows.n_rows, resident) * cluster));
  require(cudaLaunchKernelEx(&config, kernel, p), "launch");
}

template <class E, class Out, bool EXTENDED>
void launch_with(const RowArguments& p, cudaStream_t stream) {
  const bool two_temperatures = p.settings.two_temperatures;
  if (p.settings.softcap > 0)
    two_temperatures ? launch<E, Out, true, true, EXTENDED>(p, stream)
                     : launch<E, Out, false, true, EXTENDED>(p, stream);
  else
    two_temperatures ? launch<E, Out, true, false, EXTENDED>(p, stream)
                     : launch<E, Out, false, false, EXTENDED>(p, stream);
}

template <class E, class Out>
void launch_for(const RowArguments& p, cudaStream_t stream) {
  p.settings.extended(p.rows) ? launch_with<E, Out, true>(p, stream) : launch_with<E, Out, false>(p, stream);
}

struct DeviceGuard {
  CUDAGuardHandle handle = nullptr;
  explicit DeviceGuard(int32_t index) { check(aoti_torch_create_cuda_guard(index, &handle) == 0, "no such device"); }
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(handle); }
};

void token_loss_rows_op(StableIValue* stack, uint64_t, uint64_t) {
  const RowCall call = row_call(stack, aoti_torch_device_type_cuda());
  const DeviceGuard guard(call.device);
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(call.device, &stream) == 0, "no stream");
  const auto at = static_cast<cudaStream_t>(stream);
  if (call.dtype == DType::bfloat16)
    launch_for<BFloat16, BFloat16>(call.p, at);
  else if (call.dtype == DType::float16)
    launch_for<Float16, Float32>(call.p, at);
  else
    launch_for<Float32, Float32>(call.p, at);
}

std::string load_error;

const bool registered = [] {
  try {
    // A driver that is older than this runtime says so here, and not at the first launch.
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    check(status != cudaErrorInsufficientDriver, "the driver is older than CUDA ",
          std::to_string(CUDART_VERSION / 1000), ".", std::to_string(CUDART_VERSION % 1000 / 10),
          ", which this part was built with");
    static Library library("CUDA", "csrc/cuda/token_loss.cu");
    library.add("_cuda_token_loss_rows", TOKEN_LOSS_ROWS, token_loss_rows_op);
  } catch (const std::exception& e) {
    load_error = e.what();
  }
  return load_error.empty();
}();

}  // namespace
}  // namespace mdpgrpo

extern "C" {
__attribute__((visibility("default"))) const char* mdpgrpo_error() { return mdpgrpo::load_error.c_str(); }
__attribute__((visibility("default"))) const char* mdpgrpo_variant() {
  return mdpgrpo::registered ? "sm_90a, sm_100a" : "";
}
}
