// Conversion of tensors and errors between PyTorch's stable ABI and the library.
#include "tensor.h"

#include <stdexcept>
#include <string>

namespace flash_mla::python {
namespace {

struct DTypeRow {
  std::int32_t torch_dtype;
  DType dtype;  // kUndefined: PyTorch's alone
  const char* name;
};

// The numbers are PyTorch's and asked for at run time, as its ABI demands.
const DTypeRow* find_dtype(std::int32_t torch_dtype) {
  static const DTypeRow kRows[] = {
      {aoti_torch_dtype_bfloat16(), DType::kBf16, "bfloat16"},
      {aoti_torch_dtype_int32(), DType::kInt32, "int32"},
      {aoti_torch_dtype_float32(), DType::kFp32, "float32"},
      {aoti_torch_dtype_float16(), DType::kFp16, "float16"},
      {aoti_torch_dtype_int64(), DType::kInt64, "int64"},
      {aoti_torch_dtype_float8_e4m3fn(), DType::kFp8E4M3, "float8_e4m3fn"},
      {aoti_torch_dtype_uint8(), DType::kUInt8, "uint8"},
      {aoti_torch_dtype_float64(), DType::kUndefined, "float64"},
      {aoti_torch_dtype_bool(), DType::kUndefined, "bool"},
      {aoti_torch_dtype_int8(), DType::kUndefined, "int8"},
      {aoti_torch_dtype_int16(), DType::kUndefined, "int16"},
      {aoti_torch_dtype_float8_e5m2(), DType::kUndefined, "float8_e5m2"},
      {aoti_torch_dtype_complex64(), DType::kUndefined, "complex64"},
  };
  for (const DTypeRow& row : kRows) {
    if (row.torch_dtype == torch_dtype) return &row;
  }
  return nullptr;
}

std::int32_t torch_dtype_of(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFp16:
      return aoti_torch_dtype_float16();
    case DType::kFp32:
      return aoti_torch_dtype_float32();
    case DType::kInt32:
      return aoti_torch_dtype_int32();
    case DType::kInt64:
      return aoti_torch_dtype_int64();
    case DType::kFp8E4M3:
      return aoti_torch_dtype_float8_e4m3fn();
    default:
      return aoti_torch_dtype_uint8();
  }
}

}  // namespace

TensorView view_of(const Tensor& tensor, const char* name) {
  static const std::int32_t kCudaType = aoti_torch_device_type_cuda();
  const AtenTensorHandle handle = tensor.get();
  std::int32_t torch_dtype = 0, device_type = 0;
  std::int64_t rank = 0;
  std::int64_t *shape = nullptr, *stride = nullptr;
  TensorView view;
  bool defined = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined));
  if (!defined)
    check(Status::error(StatusCode::kInvalidType, "%s is None, wanted a torch.Tensor", name));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &torch_dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &rank));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &shape));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &stride));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &view.data));

  const DTypeRow* row = find_dtype(torch_dtype);
  if (row == nullptr || row->dtype == DType::kUndefined) {
    const std::string dtype = row != nullptr ? row->name : "number " + std::to_string(torch_dtype);
    check(Status::error(StatusCode::kInvalidType, "%s.dtype = %s, which no argument takes", name,
                        dtype.c_str()));
  }
  view.dtype = row->dtype;
  if (device_type == kCudaType) {
    view.device.type = DeviceType::kCuda;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &view.device.index));
  }
  view.rank = static_cast<std::int32_t>(rank);
  for (std::int64_t axis = 0; axis < rank && axis < kMaxRank; ++axis) {
    view.shape[axis] = shape[axis];
    view.stride[axis] = stride[axis];
  }
  return view;
}

Tensor new_tensor(std::initializer_list<std::int64_t> shape, DType dtype, Device device) {
  const TensorView layout = contiguous_view(nullptr, dtype, device, shape);
  const bool on_cuda = device.type == DeviceType::kCuda;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      layout.rank, layout.shape, layout.stride, torch_dtype_of(dtype),
      on_cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), device.index,
      &handle));
  return Tensor(handle);
}

void check(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidArgument:
      throw std::runtime_error(std::string("[ValueError] ") + status.message());
    case StatusCode::kInvalidType:
      throw std::runtime_error(std::string("[TypeError] ") + status.message());
    case StatusCode::kUnsupported:
      throw std::runtime_error(std::string("[NotImplementedError] ") + status.message());
    default:
      throw std::runtime_error(std::string("[RuntimeError] ") + status.message());
  }
}

}  // namespace flash_mla::python
