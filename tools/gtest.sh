#!/bin/sh
# Makes GoogleTest available to CMake: Debian's package, where we may install it.
set -eu
printf '#include <gtest/gtest.h>\n' | ${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - 2>/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing libgtest-dev"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libgtest-dev; } >/dev/null
else
  echo "GoogleTest is missing, the C++ tests will be skipped. To have them: sudo apt-get install libgtest-dev" >&2
fi
