// Cells that are no pointwise function between two products: what they declare, and what the
// engines make of it. An engine that has no stages says so.
//
// A cell with
//   kLink         what stands between its two halves:
//     kProduct    a second product: the link, in place of h, with the last kLinkedGates gates of
//                 w_hh, which then have no part in the product with h
//     kNorm       layer normalisation of the link over the units
// has in place of forward and backward
//   begin(gx, gh, state, link)
//       gh: of linked gates nothing yet. Gives the link; what it leaves in gh, and in the states
//       but h, comes to finish
//   finish(gx, gh, link, state, saved)
//       gh: of linked gates their product now, bias included; link: normalised, if that is what
//       stands between; state[0]: h_{t-1} again
//   finish_backward(saved, link, prev, next, dstate, dgates, dlink)
//       link: as finish had it, if it was normalised. Gives dL/d(gates) at least of the linked ones
//       or, of a link that is normalised, dL/d(link), and takes dstate as far as it can
//   begin_backward(saved, prev, next, dlink, dstate, dgates, link)
//       the rest of dgates and dstate; and the link of a product once more, for the gradient of its
//       weights
// with one dgates, since both sides of a gate are added.
//
// A cell with
//   kNormGroups   how many gates are normalised together over the units, each side by itself; of a
//                 diagonal recurrence the input side only
// sees gains times what is normalised, plus the biases, in place of the products. The products
// themselves are kept for backward, behind the states. Behind the bias in b_hh stand, each (G*H),
// the gains of the input side and of the hidden one, if that is normalised; then, each (H), gain
// and bias of a normalised link. Without b_hh gains are 1.
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

enum class Link { kNone, kProduct, kNorm };

template <class Cell>
constexpr Link link_of() {
  if constexpr (requires { Cell::kLink; })
    return Cell::kLink;
  else
    return Link::kNone;
}
template <class Cell>
constexpr Link kLinkOf = link_of<Cell>();

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

// Gates of the first group, and of the second one if there is one.
struct NormGroups {
  int first, second = 0;
};
constexpr double kNormEps = 1e-5;  // torch.nn.LayerNorm's

template <class Cell>
constexpr bool kNormsGates = requires { Cell::kNormGroups; };
template <class Cell>
constexpr bool kNormsHidden = kNormsGates<Cell> && Cell::kRecurrence == Recurrence::kDense;
template <class Cell>
constexpr bool kHasStages = kLinkOf<Cell> != Link::kNone || kNormsGates<Cell>;

// Planes of products that are kept, behind the states: of the input side, then of the hidden one.
template <class Cell>
constexpr int kNormPlanes = kNormsGates<Cell> ? Cell::kGates * (kNormsHidden<Cell> ? 2 : 1) : 0;
// Gains of both sides, then of the link, and its bias.
template <class Cell>
constexpr int kNormParameters = kNormPlanes<Cell> + (kLinkOf<Cell> == Link::kNorm ? 2 : 0);

// Calls use(begin, count) for the columns of each group.
template <class Cell, class Use>
RNNFAST_HD void for_norm_groups(int64_t hidden_size, const Use& use) {
  constexpr NormGroups kGroups = Cell::kNormGroups;
  use(int64_t{0}, kGroups.first * hidden_size);
  if constexpr (kGroups.second > 0) use(kGroups.first * hidden_size, kGroups.second * hidden_size);
}

template <class Cell>
constexpr bool is_staged_cell() {
  static_assert(is_cell<Cell>() && kHasStages<Cell> && kParametersOf<Cell> == 0);
  static_assert(kLinkedGatesOf<Cell> == 0 || (Cell::kRecurrence == Recurrence::kDense &&
                                              kFreeGatesOf<Cell> > 0 && !Cell::kSplitGates),
                "a second product has gates of w_hh, and leaves some to h");
  if constexpr (kNormsGates<Cell>)
    static_assert(Cell::kSplitGates && kLinkOf<Cell> != Link::kProduct &&
                      Cell::kNormGroups.first + Cell::kNormGroups.second == Cell::kGates,
                  "every gate is normalised, and each side has a gradient of its own");
  return true;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
