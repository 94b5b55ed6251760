// naslora_kernels._C: registers the operators of the CPU kernels and chooses their instruction set.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention_operators.h"
#include "launches.h"

namespace naslora {

// setup.py defines NASLORA_FOR_EACH_ISA(X) as X(name, base) for every compiled instruction set,
// best last. Its attention has the name `name`, its other kernels the name `base`.
#define NASLORA_DECLARE(isa, base)     \
  extern const Kernels kernels_##base; \
  extern const AttentionKernels attention_##isa;
NASLORA_FOR_EACH_ISA(NASLORA_DECLARE)
#undef NASLORA_DECLARE

const Kernels* kernels = nullptr;
const AttentionKernels* attention_kernels = nullptr;

namespace {

#if defined(__x86_64__)
// A bit of what cpuid says of extended features. Older compilers lack names for these.
bool leaf_7(unsigned subleaf, int output, int bit) {
  unsigned r[4] = {};  // eax, ebx, ecx, edx; zeros for a leaf that is not there
  __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]);
  return r[output] >> bit & 1;
}

// Linux keeps the tiles of a process only after it has asked for them.
bool has_tiles() {
#if defined(NASLORA_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return leaf_7(0, 3, 22) && leaf_7(0, 3, 24) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool machine_has(const char* name) {
#if defined(__x86_64__)
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = machine_has("avx512") && leaf_7(1, 0, 5);
  if (!strcmp(name, "amx")) return bf16 && has_tiles();
  // vdpbf16ps takes Intel's processors twice as long as AMD's. Widened operands are faster there.
  if (!strcmp(name, "avx512_bf16")) return bf16 && (!__builtin_cpu_is("intel") || has_tiles());
#endif
  return !strcmp(name, "baseline");
}

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const AttentionKernels* attention;
};
#define NASLORA_ADDRESSES(isa, base) {#isa, &kernels_##base, &attention_##isa},
const InstructionSet compiled[] = {NASLORA_FOR_EACH_ISA(NASLORA_ADDRESSES)};
#undef NASLORA_ADDRESSES

// torch_parallel_for of torch's stable C interface. If null, the calling thread runs everything.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, TaskRange body,
                                     void* context);
TorchParallelFor torch_parallel_for = nullptr;

// Memory that grows to the largest request.
class Scratch {
 public:
  ~Scratch() { host_free(data_); }
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      host_free(data_);
      data_ = nullptr;
      size_ = 0;
      data_ = host_allocate(bytes);
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

constexpr std::align_val_t CACHE_LINE{64};

}  // namespace

void* host_allocate(size_t bytes) {
  void* memory = ::operator new(bytes, CACHE_LINE);
#if defined(NASLORA_POISON)
  memset(memory, 0xff, bytes);  // NaN, so that tests detect reads of unwritten memory
#endif
  return memory;
}

void host_free(void* memory) { ::operator delete(memory, CACHE_LINE); }

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  void* memory = scratch.at_least(bytes);
#if defined(NASLORA_POISON)
  memset(memory, 0xff, bytes);
#endif
  return memory;
}

void run_tasks(int64_t count, TaskRange body, void* context) {
  if (count <= 0) return;
  if (count == 1 || !torch_parallel_for) return body(0, count, context);
  if (torch_parallel_for(0, count, 1, body, context) != 0) throw std::bad_alloc();
}

namespace {

PyObject* set_parallel_for(PyObject*, PyObject* address) {
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(PyLong_AsVoidPtr(address));
  Py_RETURN_NONE;
}

// register_operators(namespace, dispatch_key)
PyObject* register_operators(PyObject*, PyObject* arguments) {
  std::vector<Registration> all = operators<Launches>();
  all.push_back({"rel_pos_attention", as_operator<rel_pos_attention>});
  all.push_back({"rel_pos_attention_backward", as_operator<rel_pos_attention_backward>});
  return register_all(arguments, all);
}

// The compiled instruction sets, best last: all of them, or those that this machine has.
PyObject* names_of_sets(bool all) {
  PyObject* names = PyList_New(0);
  for (const InstructionSet& set : compiled) {
    if (!names || !(all || machine_has(set.name))) continue;
    PyObject* name = PyUnicode_FromString(set.name);
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

// capabilities() -> the instruction sets that this machine has, best last
PyObject* capabilities(PyObject*, PyObject*) { return names_of_sets(false); }

// use_capability(name): computes with that instruction set from now on
PyObject* use_capability(PyObject*, PyObject* value) {
  PyObject* bytes = PyUnicode_AsUTF8String(value);
  if (!bytes) return nullptr;
  const char* name = PyBytes_AsString(bytes);
  const InstructionSet* found = nullptr;
  for (const InstructionSet& set : compiled)
    if (name && machine_has(set.name) && !strcmp(name, set.name)) found = &set;
  Py_DECREF(bytes);
  if (!found) {
    PyErr_Format(PyExc_ValueError, "this machine or this build has no instruction set %R", value);
    return nullptr;
  }
  kernels = found->kernels;
  attention_kernels = found->attention;
  Py_RETURN_NONE;
}

// build_info() -> (compiler, instruction sets compiled)
PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  PyObject* names = names_of_sets(true);
  return names ? Py_BuildValue("(sN)", compiler, names) : nullptr;
}

PyMethodDef methods[] = {
    {"use_torch", use_torch, METH_O, nullptr},
    {"register_operators", register_operators, METH_VARARGS, nullptr},
    {"poison", poison, METH_O, nullptr},
    {"set_parallel_for", set_parallel_for, METH_O, nullptr},
    {"capabilities", capabilities, METH_NOARGS, nullptr},
    {"use_capability", use_capability, METH_O, nullptr},
    {"build_info", build_info, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace naslora

PyMODINIT_FUNC PyInit__C() {
  naslora::kernels = naslora::compiled[0].kernels;
  naslora::attention_kernels = naslora::compiled[0].attention;
  return naslora::make_module("_C", "NAS-LoRA's CPU kernels", naslora::methods);
}
