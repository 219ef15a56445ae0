#!/bin/sh
# Runs the nvcc command given, and keeps what ptxas says of each kernel (registers, spills, shared memory) beside the
# object, in OBJECT.ptxas. CMake calls it for every .cu file; what is no such report goes to stderr as ever.

object=
for argument in "$@"; do
  case $previous in -o) object=$argument ;; esac
  previous=$argument
done

"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' "$object.ptxas" >&2
exit $status
