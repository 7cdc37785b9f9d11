// An operator takes a flat list of arguments; the code here takes some of them in groups.
// A group's members are listed once: below.
#pragma once

#include "ops/module.h"

#include <tuple>
#include <utility>

namespace epsa {

// How an argument stands in the flat list: as itself, or as a group's members. Members that
// a group gained later are appended to the list, since exported programs hold its order.
template <class Arg>
struct Group {
  using Members = std::tuple<Arg>;
  using Appended = std::tuple<>;
  static Members split(Arg arg) { return Members(std::forward<Arg>(arg)); }
  static Appended appended(const std::remove_reference_t<Arg>&) { return {}; }
  static Arg join(Arg arg) { return std::forward<Arg>(arg); }
};

template <>
struct Group<const ConvSettings&> {
  using Members = std::tuple<at::IntArrayRef, int64_t, at::IntArrayRef, at::IntArrayRef>;
  using Appended = std::tuple<bool>;
  static Members split(const ConvSettings& k) {
    return {k.groups, k.stride, k.padding, k.dilation};
  }
  static Appended appended(const ConvSettings& k) { return {k.winograd}; }
  static ConvSettings join(
      at::IntArrayRef groups, int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation,
      bool winograd) {
    return {groups, stride, padding, dilation, winograd};
  }
};

template <>
struct Group<const SEWeights&> {
  using Members = std::tuple<
      const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
      const std::optional<at::Tensor>&>;
  using Appended = std::tuple<>;
  static Members split(const SEWeights& se) {
    return {se.fc1_weight, se.fc1_bias, se.fc2_weight, se.fc2_bias};
  }
  static Appended appended(const SEWeights&) { return {}; }
  static SEWeights join(
      const at::Tensor& fc1_weight, const std::optional<at::Tensor>& fc1_bias,
      const at::Tensor& fc2_weight, const std::optional<at::Tensor>& fc2_bias) {
    return {fc1_weight, fc1_bias, fc2_weight, fc2_bias};
  }
};

template <>
struct Group<const Epilogue&> {
  using Members = std::tuple<>;
  using Appended =
      std::tuple<const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool>;
  static Members split(const Epilogue&) { return {}; }
  static Appended appended(const Epilogue& e) { return {e.scale, e.shift, e.relu}; }
  static Epilogue join(
      const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, bool relu) {
    return {scale, shift, relu};
  }
};

template <>
struct Group<const ConvBias&> {
  using Members = std::tuple<>;
  using Appended = std::tuple<const std::optional<at::Tensor>&>;
  static Members split(const ConvBias&) { return {}; }
  static Appended appended(const ConvBias& bias) { return {bias.value}; }
  static ConvBias join(const std::optional<at::Tensor>& bias) { return {bias}; }
};

template <class... Args>
using FlatList = decltype(std::tuple_cat(
    std::declval<typename Group<Args>::Members>()...,
    std::declval<typename Group<Args>::Appended>()...));

// Groups as the flat list.
template <class... Args>
FlatList<Args...> flat_list(Args... args) {
  return std::tuple_cat(
      Group<Args>::split(std::forward<Args>(args))..., Group<Args>::appended(args)...);
}

// A function of groups, as the function of the flat list that a library registers.
template <auto f, class... Args>
class Flat {
  static constexpr size_t kMembers[] = {std::tuple_size_v<typename Group<Args>::Members>...};
  static constexpr size_t kAppended[] = {std::tuple_size_v<typename Group<Args>::Appended>...};

  static constexpr size_t sum(const size_t* counts, size_t count) {
    return count == 0 ? 0 : counts[count - 1] + sum(counts, count - 1);
  }

  template <
      class Arg, size_t first, size_t first_appended, class List, size_t... member,
      size_t... appended>
  static decltype(auto) join(
      List& list, std::index_sequence<member...>, std::index_sequence<appended...>) {
    return Group<Arg>::join(
        std::get<first + member>(std::move(list))...,
        std::get<first_appended + appended>(std::move(list))...);
  }

  template <size_t i, class List>
  static decltype(auto) argument(List& list) {
    using Arg = std::tuple_element_t<i, std::tuple<Args...>>;
    constexpr size_t all = sum(kMembers, sizeof...(Args));
    return join<Arg, sum(kMembers, i), all + sum(kAppended, i)>(
        list, std::make_index_sequence<kMembers[i]>(), std::make_index_sequence<kAppended[i]>());
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
