"""Our CUDA kernels on a CPU: their PTX, translated to C++, on a machine with random timing; no GPU is needed.

``launcher.py`` makes a host library of ``kernels/linear/sm90_fp8.cu`` that records launches (the kernels
are as they are), ``translate.py`` turns the PTX of its kernels into C++ for the machine of ``device.h``,
``machine.h``, ``tensor_core.h`` and ``schedule.h``, ``build.py`` puts it together under ``build/emulator``,
and ``cases.py`` compares a layer with float64. ``four_bit.py`` does the same with the kernels for 4 bits.

It shows wrong indices, wrong barriers and races between copies, wgmmas and reads. It does not show missing
memory fences and proxy fences (memory is sequentially consistent), what ptxas makes of the PTX, register
limits, speed, or the rounding inside the tensor cores (every wgmma adds an exact sum, rounded once).
"""
