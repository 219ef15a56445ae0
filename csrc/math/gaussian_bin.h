// -ln of a Gaussian's mass in a bin, out to any number of standard deviations, and its slopes. In float32 +, -, x and /,
// each rounded once in the written order: the same bits on every CPU level and device.

#pragma once

#include "exp.h"
#include "lanes/lanes.h"
#include "log.h"

namespace diffkern {

// An element's term of the bound, in nats, and its slopes.
template <class F>
struct BoundTerm {
  F nats, by_mean, by_log_var;
};

// Mills' ratio (1 - Phi(x)) / phi(x) of x >= 0, within 4.2e-7 of itself: t times a polynomial in t = 4 / (4 + x).
template <class F>
DIFFKERN_FN F mills_ratio(F x) {
  constexpr float kMills[] = {0x1.fffffep-3f, 0x1.00009p-2f,   0x1.dfd108p-3f,  0x1.a2ea66p-3f, 0x1.2ec0e2p-3f,
                              0x1.4700fap-3f, -0x1.45a5c4p-4f, 0x1.eac118p-3f,  -0x1.9f308p-3f, 0x1.96359ep-5f};
  const F t = (F{} + 4.0f) / (x + 4.0f);
  return t * polynomial(t, kMills);
}

// -ln of the mass that N(mean, e^log_var) has in the bin [x - 1/255, x + 1/255]; the bins at -1 and 1 are open (Ho et
// al. 2020, eq. 13).
//
// With c = (x - mean) / sd, mirrored so that c <= 0, and w the bin's width in sd, the mass is Phi(u) - Phi(l) of
// u, l = c +- w/2. phi(l) = phi(u) e^(wc), so that with Mills' ratio R
//   u <= 0: phi(u) (R(-u) - e^(wc) R(-l)), whose bracket neither underflows nor cancels,
//   u > 0:  1 - phi(u) (R(u) + e^(wc) R(-l)),
// and where w (1 + |c|) is small: phi(c) w (1 + w^2 He_2(c) / 24 + w^4 He_4(c) / 1920), the Taylor series.
template <class F>
DIFFKERN_LONG_FN BoundTerm<F> bin_term(F x, F mean, F log_var) {
  constexpr float kWidth = 2.0f / 255.0f, kEdge = 0.999f, kSmall = 0.25f;
  constexpr float kHalfLn2Pi = 0x1.d67f1cp-1f, kRsqrt2Pi = 0x1.988454p-2f;
  const F zero{}, one = zero + 1.0f, infinity = zero + __builtin_inff();
  const F inverse_sd = exp<F>(log_var * -0.5f), w = inverse_sd * kWidth;
  F c = (x - mean) * inverse_sd;
  F side = c > 0.0f ? -one : one;  // open bins: so that l is the end at infinity
  side = x > kEdge ? -one : side;
  side = x < -kEdge ? one : side;
  c = side * c;
  const F u = c + w * 0.5f, l = c - w * 0.5f;
  F fall = exp<F>(w * c);
  fall = x > kEdge ? zero : fall;
  fall = x < -kEdge ? zero : fall;

  const F density = exp<F>((u * u) * -0.5f) * kRsqrt2Pi, far = fall * mills_ratio<F>(l < 0.0f ? -l : l);
  const F upper = one - density * (mills_ratio<F>(u) + far), lower = mills_ratio<F>(-u) - far;
  const F mass = u > 0.0f ? upper : lower, scale = (u > 0.0f ? density : one) / mass;
  F nats = (u > 0.0f ? zero : (u * u) * 0.5f + kHalfLn2Pi) - log<F>(mass);
  F by_c = scale * (fall - 1.0f), by_log_var = (scale * (u - fall * l)) * 0.5f;

  F reach = w * (c < 0.0f ? one - c : one + c);
  reach = fall > 0.0f ? reach : infinity;
  const F cc = c * c, w2 = (w * w) * (1.0f / 24.0f), w4 = (w2 * w2) * 0.3f;
  const F second = w2 * (cc - 1.0f), fourth = w4 * (cc * (cc - 6.0f) + 3.0f);
  const F inverse = one / ((one + second) + fourth);
  const F near_by_c = c - (c * (w2 * 2.0f + w4 * (cc * 4.0f - 12.0f))) * inverse;
  const F near_by_log_var = ((one + (second * 2.0f + fourth * 4.0f) * inverse) - c * near_by_c) * 0.5f;
  nats = reach < kSmall ? cc * 0.5f + kHalfLn2Pi - log<F>(w * ((one + second) + fourth)) : nats;
  by_c = reach < kSmall ? near_by_c : by_c;
  by_log_var = reach < kSmall ? near_by_log_var : by_log_var;
  return {nats, -(side * (inverse_sd * by_c)), by_log_var};
}

}  // namespace diffkern
