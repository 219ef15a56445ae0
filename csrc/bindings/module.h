// The parts of the Python module.

#pragma once

#include <pybind11/pybind11.h>

namespace diffkern {

void add_plans(pybind11::module_& module);
void add_word_hash(pybind11::module_& module);

}  // namespace diffkern
