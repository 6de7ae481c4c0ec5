#pragma once

#include <pybind11/pybind11.h>

// plan(op, **shape): what a call would cost, from the sizes alone.
pybind11::dict plan(const std::string& op, const pybind11::kwargs& shape);
