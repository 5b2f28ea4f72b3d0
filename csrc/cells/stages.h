// Cells that are no pointwise function between two products: what they declare, and what the
// engines make of it. A cell with
//   kLink         what stands between its two halves:
//     kProduct    a second product: the link, in place of h, with the last kLinkedGates gates of
//                 w_hh, which then have no part in the product with h
// has in place of forward and backward
//   begin(gx, gh, state, link)
//       gh: of linked gates nothing yet. Gives the link; what it leaves in gh, and in the states
//       but h, comes to finish
//   finish(gx, gh, state, saved)
//       gh: of linked gates their product now, bias included; state[0]: h_{t-1} again
//   finish_backward(saved, prev, next, dstate, dgates)
//       gives dL/d(gates) at least of the linked ones, and takes dstate as far as it can
//   begin_backward(saved, prev, next, dlink, dstate, dgates, link)
//       the rest of dgates and dstate, and the link once more, for the gradient of its weights
// with one dgates, since both sides of a gate are added. An engine that has no stages says so.
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

enum class Link { kNone, kProduct };

template <class Cell>
constexpr Link link_of() {
  if constexpr (requires { Cell::kLink; })
    return Cell::kLink;
  else
    return Link::kNone;
}
template <class Cell>
constexpr Link kLinkOf = link_of<Cell>();

template <class Cell>
constexpr bool kHasStages = kLinkOf<Cell> != Link::kNone;

// Gates of w_hh that the link is multiplied with, the last ones, and those that h is.
template <class Cell>
constexpr int linked_gates() {
  if constexpr (kLinkOf<Cell> == Link::kProduct)
    return Cell::kLinkedGates;
  else
    return 0;
}
template <class Cell>
constexpr int kLinkedGatesOf = linked_gates<Cell>();
template <class Cell>
constexpr int kFreeGatesOf = Cell::kGates - kLinkedGatesOf<Cell>;

template <class Cell>
constexpr bool is_staged_cell() {
  static_assert(is_cell<Cell>() && kHasStages<Cell>);
  static_assert(kLinkedGatesOf<Cell> == 0 || (Cell::kRecurrence == Recurrence::kDense &&
                                              kFreeGatesOf<Cell> > 0 && !Cell::kSplitGates),
                "a second product has gates of w_hh, and leaves some to h");
  return true;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
