// An operator takes a flat list of arguments; the code here takes some of them in groups.
// A group's members are listed once: below.
#pragma once

#include "ops/module.h"

#include <tuple>
#include <utility>

namespace epsa {

// How an argument stands in the flat list: as itself, or as a group's members.
template <class Arg>
struct Group {
  using Members = std::tuple<Arg>;
  static Members split(Arg arg) { return Members(std::forward<Arg>(arg)); }
  static Arg join(Arg arg) { return std::forward<Arg>(arg); }
};

template <>
struct Group<const ConvSettings&> {
  using Members = std::tuple<at::IntArrayRef, int64_t, at::IntArrayRef, at::IntArrayRef>;
  static Members split(const ConvSettings& k) {
    return {k.groups, k.stride, k.padding, k.dilation};
  }
  static ConvSettings join(
      at::IntArrayRef groups, int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
    return {groups, stride, padding, dilation};
  }
};

template <>
struct Group<const SEWeights&> {
  using Members = std::tuple<
      const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
      const std::optional<at::Tensor>&>;
  static Members split(const SEWeights& se) {
    return {se.fc1_weight, se.fc1_bias, se.fc2_weight, se.fc2_bias};
  }
  static SEWeights join(
      const at::Tensor& fc1_weight, const std::optional<at::Tensor>& fc1_bias,
      const at::Tensor& fc2_weight, const std::optional<at::Tensor>& fc2_bias) {
    return {fc1_weight, fc1_bias, fc2_weight, fc2_bias};
  }
};

template <class... Args>
using FlatList = decltype(std::tuple_cat(std::declval<typename Group<Args>::Members>()...));

// A function of groups, as the function of the flat list that a library registers.
template <auto f, class... Args>
class Flat {
  // The place of argument i's first member in the flat list.
  static constexpr size_t place(size_t i) {
    constexpr size_t members[] = {std::tuple_size_v<typename Group<Args>::Members>...};
    size_t place = 0;
    for (size_t before = 0; before < i; ++before) {
      place += members[before];
    }
    return place;
  }

  template <class Arg, size_t first, class List, size_t... member>
  static decltype(auto) join(List& list, std::index_sequence<member...>) {
    return Group<Arg>::join(std::get<first + member>(std::move(list))...);
  }

  template <size_t i, class List>
  static decltype(auto) argument(List& list) {
    using Arg = std::tuple_element_t<i, std::tuple<Args...>>;
    constexpr size_t members = std::tuple_size_v<typename Group<Arg>::Members>;
    return join<Arg, place(i)>(list, std::make_index_sequence<members>());
  }

  template <class List, size_t... i>
  static decltype(auto) pass(List list, std::index_sequence<i...>) {
    return f(argument<i>(list)...);
  }

 public:
  template <class R, class... Members>
  static R call(Members... members) {
    return pass(
        std::tuple<Members...>(std::forward<Members>(members)...),
        std::index_sequence_for<Args...>());
  }

  template <class R, class... Members>
  static auto pointer(std::tuple<Members...>*) {
    return &call<R, Members...>;
  }
};

template <auto f, class R, class... Args>
auto flat(R (*)(Args...)) {
  return Flat<f, Args...>::template pointer<R>(static_cast<FlatList<Args...>*>(nullptr));
}

// What a library registers for f.
template <auto f>
auto flat() {
  return flat<f>(f);
}

}  // namespace epsa
