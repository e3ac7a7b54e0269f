// What the CPU and the CUDA extension present to Python alike.
#ifndef JAX_EP_XLA_MODULE_H_
#define JAX_EP_XLA_MODULE_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/error.h"
#include "common/peers.h"

namespace jax_ep::xla_ffi {

namespace nb = nanobind;

// Binds MoEShape and CommunicatorSpec, the same in both modules.
inline void BindSpecs(nb::module_& m) {
  nb::class_<MoEShape>(m, "MoEShape")
      .def(
          "__init__",
          [](MoEShape* self, int32_t num_ranks, int32_t num_experts, int32_t topk,
             int32_t hidden_size, int32_t max_tokens_per_rank, int32_t expert_alignment,
             int64_t capacity, int32_t layout, int32_t dtype, bool drop_overflow,
             bool low_latency) {
            new (self) MoEShape{num_ranks,
                                num_experts,
                                topk,
                                hidden_size,
                                max_tokens_per_rank,
                                expert_alignment,
                                capacity,
                                static_cast<OutputLayout>(layout),
                                static_cast<DType>(dtype),
                                drop_overflow,
                                low_latency};
          },
          nb::kw_only(), nb::arg("num_ranks"), nb::arg("num_experts"), nb::arg("topk"),
          nb::arg("hidden_size"), nb::arg("max_tokens_per_rank"), nb::arg("expert_alignment"),
          nb::arg("capacity"), nb::arg("layout"), nb::arg("dtype"), nb::arg("drop_overflow"),
          nb::arg("low_latency"))
      .def("route_tables_size", [](const MoEShape& shape, int64_t num_tokens) {
        return RouteTablesLayout(shape, num_tokens).size;
      });
  using Pair = std::pair<int32_t, int32_t>;
  using Members = std::vector<std::vector<Pair>>;
  nb::class_<CommunicatorSpec>(m, "CommunicatorSpec")
      .def(
          "__init__",
          [](CommunicatorSpec* self, int64_t id, const MoEShape& shape, const Members& groups,
             int32_t process, double timeout_s, int32_t num_sms, Pair dispatch_blocks,
             Pair combine_blocks, int32_t max_requests) {
            const BlockCounts dispatch{dispatch_blocks.first, dispatch_blocks.second};
            const BlockCounts combine{combine_blocks.first, combine_blocks.second};
            new (self)
                CommunicatorSpec{id, shape, {}, process, timeout_s, num_sms, dispatch, combine};
            self->max_requests = max_requests;
            for (const auto& members : groups) {
              Group& group = self->groups.emplace_back();
              for (const auto& [member_process, ordinal] : members)
                group.push_back({member_process, ordinal});
            }
          },
          nb::kw_only(), nb::arg("id"), nb::arg("shape"), nb::arg("groups"), nb::arg("process"),
          nb::arg("timeout_s"), nb::arg("num_sms"), nb::arg("dispatch_blocks"),
          nb::arg("combine_blocks"), nb::arg("max_requests"));
}

// code, rank, expected, got, and for a timeout its text.
using PyError = std::tuple<int32_t, int32_t, int64_t, int64_t, std::string>;

inline PyError ToPython(const ErrorRecord& error, const CommunicatorSpec& spec) {
  return {static_cast<int32_t>(error.code), error.rank, error.expected, error.got,
          error.code == ErrorCode::kTimeout ? DescribeTimeout(error, spec.timeout_s) : ""};
}

inline void ThrowIfError(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

template <typename Function>
nb::capsule Capsule(Function* function) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

// Both backends' communicators, as jax_ep/_bootstrap.py uses them.
template <typename Communicator>
void BindCommunicator(nb::module_& m) {
  nb::class_<Communicator>(m, "Communicator")
      .def(nb::init<const CommunicatorSpec&, bool>(), nb::arg("spec"), nb::arg("across_processes"))
      .def("handle", &Communicator::handle)
      .def("connect", &Communicator::Connect, nb::arg("process"), nb::arg("handle"))
      .def("disconnect", &Communicator::Disconnect, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("arena_bytes", &Communicator::arena_bytes)
      .def("take_error", &Communicator::TakeError)
      .def("destroy", &Communicator::Destroy, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace jax_ep::xla_ffi

#endif  // JAX_EP_XLA_MODULE_H_
