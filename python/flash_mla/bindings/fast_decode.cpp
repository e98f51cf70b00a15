// The eager way of a decode: a plain Python function that does what the operator does, without
// PyTorch's dispatcher, which costs more than all else that a call does on the host.
//
// Tensors are read through PyTorch's DLPack exchange API (`__dlpack_c_exchange_api__`), which lends
// a view without owning anything. Results are made by the functions that torch.compile's own code
// makes its tensors with; DLPack's allocator would give imported tensors, and
// Tensor.record_stream passes over memory that PyTorch's allocator does not know as its own.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "decode_call.h"
#include "tensor.h"

// NOTE: refuses to be included where the stable ABI is asked for, although it is plain C.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

namespace flash_mla::python {
namespace {

// What PyTorch gives, for the life of the process.
struct Torch {
  DLPackDLTensorFromPyObjectNoSync borrow = nullptr;
  PyTypeObject* tensor_type = nullptr;
  PyObject* empty_cpu = nullptr;   // (shape, strides, dtype) -> tensor
  PyObject* empty_cuda = nullptr;  // the same, on the current device
  PyObject* bf16 = nullptr;        // dtypes
  PyObject* fp16 = nullptr;
  PyObject* fp32 = nullptr;
  PyObject* modes = nullptr;          // tuple of functions, true where the operator is wanted
  PyObject* requires_grad = nullptr;  // the name
};
Torch torch_api;

// The dtypes that a decode takes.
DType dtype_of(DLDataType dtype) {
  if (dtype.lanes != 1) return DType::kUndefined;
  if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBf16;
  if (dtype.code == kDLFloat && dtype.bits == 16) return DType::kFp16;
  if (dtype.code == kDLFloat && dtype.bits == 32) return DType::kFp32;
  if (dtype.code == kDLInt && dtype.bits == 32) return DType::kInt32;
  return DType::kUndefined;
}

// False when `object` is nothing that the eager way takes.
bool view_of_object(PyObject* object, TensorView* view) {
  DLTensor tensor;
  if (Py_TYPE(object) != torch_api.tensor_type) return false;
  if (torch_api.borrow(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.device.device_type == kDLCUDA) {
    view->device = {DeviceType::kCuda, tensor.device.device_id};
  } else if (tensor.device.device_type != kDLCPU) {
    return false;
  }
  view->dtype = dtype_of(tensor.dtype);
  if (!view->defined() || tensor.ndim > kMaxRank) return false;
  view->rank = tensor.ndim;
  bool has_elements = true;
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    view->shape[axis] = tensor.shape[axis];
    view->stride[axis] = tensor.strides[axis];
    has_elements = has_elements && tensor.shape[axis] > 0;
  }
  if (tensor.data == nullptr) return !has_elements;  // not so: a tensor without memory of its own
  view->data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  return true;
}

bool view_of_optional(PyObject* object, TensorView* view) {
  return object == Py_None || view_of_object(object, view);
}

bool is_true(PyObject* stolen) {
  const bool value = stolen == nullptr || PyObject_IsTrue(stolen) != 0;
  Py_XDECREF(stolen);
  PyErr_Clear();
  return value;
}

// PyTorch traces, records or differentiates, or a mode of the user's wants to see the operator.
bool wants_operator(PyObject* q, PyObject* kv_cache) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(torch_api.modes); ++i) {
    if (is_true(PyObject_CallNoArgs(PyTuple_GetItem(torch_api.modes, i)))) return true;
  }
  return is_true(PyObject_GetAttr(q, torch_api.requires_grad)) ||
         is_true(PyObject_GetAttr(kv_cache, torch_api.requires_grad));
}

PyObject* tuple_of(const std::int64_t* values, int count) {
  PyObject* const tuple = PyTuple_New(count);
  for (int i = 0; tuple != nullptr && i < count; ++i) {
    PyTuple_SetItem(tuple, i, PyLong_FromLongLong(values[i]));
  }
  return tuple;
}

// The layout of one of the results as Python objects, kept for the next call, whose shapes are
// mostly the same. Used under the interpreter's lock.
struct Layout {
  TensorView view;
  PyObject* shape = nullptr;
  PyObject* strides = nullptr;

  // False when there is no memory.
  bool set(std::initializer_list<std::int64_t> extents) {
    if (shape != nullptr && std::equal(extents.begin(), extents.end(), view.shape)) return true;
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    view = contiguous_view(nullptr, DType::kUndefined, {}, extents);
    shape = tuple_of(view.shape, view.rank);
    strides = shape != nullptr ? tuple_of(view.stride, view.rank) : nullptr;
    if (strides == nullptr) Py_CLEAR(shape);
    return shape != nullptr;
  }
};
Layout out_layout, lse_layout;

// A new tensor, and its view; null when it fails or comes on another device than asked for.
PyObject* new_result(Layout& layout, std::initializer_list<std::int64_t> shape, DType dtype,
                     Device device, TensorView* view) {
  if (!layout.set(shape)) return nullptr;
  PyObject* const empty =
      device.type == DeviceType::kCuda ? torch_api.empty_cuda : torch_api.empty_cpu;
  PyObject* const torch_dtype = dtype == DType::kBf16   ? torch_api.bf16
                                : dtype == DType::kFp16 ? torch_api.fp16
                                                        : torch_api.fp32;
  // Held, because another thread may change the layout while the allocator waits.
  PyObject* const shape_tuple = layout.shape;
  PyObject* const stride_tuple = layout.strides;
  Py_INCREF(shape_tuple);
  Py_INCREF(stride_tuple);
  PyObject* const result =
      PyObject_CallFunctionObjArgs(empty, shape_tuple, stride_tuple, torch_dtype, nullptr);
  Py_DECREF(shape_tuple);
  Py_DECREF(stride_tuple);
  if (result != nullptr && view_of_object(result, view) && view->device == device) return result;
  Py_XDECREF(result);
  return nullptr;
}

// Without the interpreter's lock, which the operator does not hold either.
bool decode_unlocked(const DecodeArgs& args, const DecodePlan& plan) {
  PyThreadState* const state = PyEval_SaveThread();
  bool done = true;
  try {
    run_decode(args, plan);
  } catch (...) {
    done = false;
  }
  PyEval_RestoreThread(state);
  return done;
}

// (q, k_cache, block_table, cache_seqlens, softmax_scale, causal, plan, num_splits,
// batch_invariant) -> (out, lse), or None where the operator has to be asked: for arguments and
// modes that only it serves, and for every error, so that there is one place which words them.
PyObject* fast_decode(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  DecodeArgs args;
  DecodePlan plan;
  if (count != 9 || !view_of_object(arguments[0], &args.q) ||
      !view_of_object(arguments[1], &args.kv_cache) ||
      !view_of_object(arguments[2], &args.block_table) ||
      !view_of_object(arguments[3], &args.cache_seqlens) ||
      !view_of_optional(arguments[6], &plan.metadata) ||
      !view_of_optional(arguments[7], &plan.num_splits) || !has_results(args.q) ||
      !is_ready(args.q) || wants_operator(arguments[0], arguments[1])) {
    Py_RETURN_NONE;
  }
  args.softmax_scale = PyFloat_AsDouble(arguments[4]);
  args.causal = arguments[5] == Py_True;
  args.batch_invariant = arguments[8] == Py_True;

  const TensorView& q = args.q;
  const std::int64_t b = q.shape[0], s_q = q.shape[1], h_q = q.shape[2];
  PyObject* const out =
      new_result(out_layout, {b, s_q, h_q, kHeadDimV}, q.dtype, q.device, &args.out);
  PyObject* const lse =
      out != nullptr ? new_result(lse_layout, {b, h_q, s_q}, DType::kFp32, q.device, &args.lse)
                     : nullptr;
  PyObject* const results =
      lse != nullptr && decode_unlocked(args, plan) ? PyTuple_Pack(2, out, lse) : nullptr;
  Py_XDECREF(out);
  Py_XDECREF(lse);
  if (results != nullptr) return results;
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyMethodDef method = {
    "fast_decode",
    reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fast_decode)),
    METH_FASTCALL,
    nullptr,
};

}  // namespace
}  // namespace flash_mla::python

// The function above, or None when this PyTorch's exchange API is not one that we know.
// `exchange_api` is torch.Tensor.__dlpack_c_exchange_api__; the rest is explained in `Torch`.
extern "C" __attribute__((visibility("default"))) PyObject* flash_mla_python_fast_decode(
    PyObject* exchange_api, PyObject* tensor_type, PyObject* empty_cpu, PyObject* empty_cuda,
    PyObject* bf16, PyObject* fp16, PyObject* fp32, PyObject* modes, PyObject* requires_grad) {
  const auto* const api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(exchange_api, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->header.version.major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    Py_RETURN_NONE;
  }
  for (PyObject* const object :
       {tensor_type, empty_cpu, empty_cuda, bf16, fp16, fp32, modes, requires_grad}) {
    Py_INCREF(object);
  }
  flash_mla::python::torch_api = {api->dltensor_from_py_object_no_sync,
                                  reinterpret_cast<PyTypeObject*>(tensor_type),
                                  empty_cpu,
                                  empty_cuda,
                                  bf16,
                                  fp16,
                                  fp32,
                                  modes,
                                  requires_grad};
  return PyCFunction_NewEx(&flash_mla::python::method, nullptr, nullptr);
}
