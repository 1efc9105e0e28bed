from pallas_kernels import *
