// What setup.py built, as JSON. Compiled again whenever any other object is: hence the date.
#include "build_record.h"  // written by setup.py

namespace resnet_fast {

const char* build_record() { return BUILD_RECORD; }

}  // namespace resnet_fast
