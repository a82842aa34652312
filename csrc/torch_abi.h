// The part of libtorch's stable C ABI that is used here, declared instead of included: nothing of torch is needed to
// build, and one binary serves every torch from 2.10 on. A test compiles this file together with torch's own headers
// (torch/csrc/stable/c/shim.h), which fails where a declaration differs.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

struct AtenTensorOpaque;
struct CUDAGuardOpaque;
struct TorchLibraryOpaque;

extern "C" {
using AtenTensorHandle = AtenTensorOpaque*;
using CUDAGuardHandle = CUDAGuardOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* ctx);

AOTITorchError aoti_torch_library_init_fragment(const char* ns, const char* file, uint32_t line,
                                                TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* k, const char* file, uint32_t line,
                                            TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char* schema);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle self, const char* name,
                                       void (*fn)(StableIValue*, uint64_t, uint64_t));
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** ret_data_ptr);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* ret_numel);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret_sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret_strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret_dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret_device_type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret_device_index);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_bool();
#ifdef USE_CUDA
AOTITorchError aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle* ret_guard);
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx);
}

namespace mdpgrpo {

// What TORCH_CHECK is elsewhere: an exception that torch turns into a RuntimeError.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message = "mdpgrpo_fast: ";
  (void)std::initializer_list<int>{(message += parts, 0)...};
  throw std::runtime_error(message);
}

enum class DType { float16, bfloat16, float32, float64, int64, uint8, boolean, other };

inline DType dtype_of(int32_t code) {
  if (code == aoti_torch_dtype_float32()) return DType::float32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::bfloat16;
  if (code == aoti_torch_dtype_float16()) return DType::float16;
  if (code == aoti_torch_dtype_float64()) return DType::float64;
  if (code == aoti_torch_dtype_int64()) return DType::int64;
  if (code == aoti_torch_dtype_uint8()) return DType::uint8;
  if (code == aoti_torch_dtype_bool()) return DType::boolean;
  return DType::other;
}

inline const char* name_of(DType dtype) {
  static const char* const names[] = {"float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool"};
  return dtype == DType::other ? "another dtype" : names[static_cast<int>(dtype)];
}

// A tensor that an op was called with. It owns one reference, as the boxed calling convention hands it over.
class Tensor {
 public:
  Tensor(AtenTensorHandle handle, const char* name) : handle_(handle), name_(name) {
    int32_t code = 0;
    bool ok = aoti_torch_get_dtype(handle_, &code) == 0 && aoti_torch_get_numel(handle_, &numel_) == 0 &&
              aoti_torch_get_dim(handle_, &dim_) == 0 && aoti_torch_get_sizes(handle_, &sizes_) == 0 &&
              aoti_torch_get_strides(handle_, &strides_) == 0 && aoti_torch_get_device_type(handle_, &device_) == 0 &&
              aoti_torch_get_data_ptr(handle_, &data_) == 0;
    dtype_ = dtype_of(code);
    if (!ok) {
      aoti_torch_delete_tensor_object(handle_);
      check(false, name_, " is not a tensor with memory of its own");
    }
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), name_(other.name_), data_(other.data_), sizes_(other.sizes_),
        strides_(other.strides_), numel_(other.numel_), dim_(other.dim_), device_(other.device_), dtype_(other.dtype_) {
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle handle() const { return handle_; }
  const char* name() const { return name_; }
  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int32_t device_type() const { return device_; }
  void* data() const { return data_; }

  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      if (sizes_[i] != 1 && strides_[i] != expected) return false;
      expected *= sizes_[i];
    }
    return true;
  }

 private:
  AtenTensorHandle handle_;
  const char* name_;
  void* data_ = nullptr;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  int64_t numel_ = 0;
  int64_t dim_ = 0;
  int32_t device_ = -1;
  DType dtype_ = DType::other;
};

// The arguments of a boxed call, taken in the order of the schema.
class Arguments {
 public:
  Arguments(StableIValue* stack, int32_t device_type) : stack_(stack), device_type_(device_type) {}

  Tensor tensor(const char* name) { return take(name, device_type_); }
  Tensor host(const char* name) { return take(name, aoti_torch_device_type_cpu()); }
  int64_t integer() { return static_cast<int64_t>(stack_[next_++]); }

 private:
  Tensor take(const char* name, int32_t device_type) {
    Tensor t(reinterpret_cast<AtenTensorHandle>(stack_[next_++]), name);
    check(t.device_type() == device_type, name, " lies on another device than this op runs on");
    return t;
  }

  StableIValue* stack_;
  int32_t device_type_;
  size_t next_ = 0;
};

template <class T>
struct dtype_for;
template <>
struct dtype_for<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct dtype_for<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct dtype_for<int64_t> {
  static constexpr DType value = DType::int64;
};
template <>
struct dtype_for<uint8_t> {
  static constexpr DType value = DType::uint8;
};
template <>
struct dtype_for<bool> {
  static constexpr DType value = DType::boolean;
};

// The elements of a contiguous tensor of that many, checked; null for an empty one where absent stands for "not given".
template <class T>
T* elements(const Tensor& t, int64_t count, bool may_be_absent = false) {
  if (may_be_absent && t.numel() == 0) return nullptr;
  check(t.dtype() == dtype_for<T>::value, t.name(), " must be ", name_of(dtype_for<T>::value), ", not ",
        name_of(t.dtype()));
  check(t.contiguous(), t.name(), " must be contiguous");
  check(t.numel() == count, t.name(), " must have ", std::to_string(count), " elements, not ",
        std::to_string(t.numel()));
  return static_cast<T*>(t.data());
}

// Defines the ops of this library when it is loaded.
class Library {
 public:
  Library(const char* dispatch_key, const char* file) {
    check(aoti_torch_library_init_fragment("mdpgrpo_fast", file, 0, &fragment_) == 0, "torch refuses a library");
    check(aoti_torch_library_init_impl("mdpgrpo_fast", dispatch_key, file, 0, &impl_) == 0, "torch refuses a library");
  }
  void add(const char* name, const std::string& schema, void (*fn)(StableIValue*, uint64_t, uint64_t)) {
    check(aoti_torch_library_def(fragment_, (name + schema).c_str()) == 0, "torch refuses the schema of ", name);
    check(aoti_torch_library_impl(impl_, name, fn) == 0, "torch refuses the implementation of ", name);
  }

 private:
  TorchLibraryHandle fragment_ = nullptr;
  TorchLibraryHandle impl_ = nullptr;
};

}  // namespace mdpgrpo
