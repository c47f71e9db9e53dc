// Which kernels run: the best table this CPU supports, or the one FASTCONV_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace fastconv {

// Names of the tables compiled in that this CPU can run, slowest first.
std::vector<std::string> supported_isas();

// Names of all tables compiled in, slowest first.
std::vector<std::string> compiled_isas();

// The table in use; where none was chosen, choose_isa's.
const Kernels& kernels();

// Whether this CPU's products should fetch a classifier's weights. Intel's lose more than it gains, however slowly they fetch: without, on
// a Xeon with 2 MiB of L2, MobileNet V3 large takes 3 to 5% less and V3 small 6 to 8%. On a Zen 4 classifiers take half the time.
bool fetches_for_vectors();

// Chooses a table by name; throws std::invalid_argument if it is unknown, not compiled in, or not supported by this CPU.
void set_isa(const std::string& name);

// FASTCONV_ISA if set, else the best. Throws as set_isa does.
void choose_isa();

}  // namespace fastconv
