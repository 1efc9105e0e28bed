// Everything that is compiled once per instruction set, inside its namespace.

#include "convert.h"
#include "lanes.h"
#include "engine.h"
#include "attention.h"
#include "self_attention.h"
