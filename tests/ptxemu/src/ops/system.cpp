// What is left: hints to the hardware that change no value here (PTX ISA, "Miscellaneous
// Instructions").
#include "pick.h"

namespace ptxemu {
namespace {

void do_nothing(Warp&, const Inst&, Mask) {}

void run_nanosleep(Warp& w, const Inst&, Mask) { w.give_up_turn = true; }

void decode_nanosleep(Decoder& d) {
  if (d.take_type() != Type::U32) d.refuse("needs .u32");
  d.need_args(1, 1);
  d.inst.o[0] = d.src(d.arg(0), Type::U32);
  d.inst.run = &run_nanosleep;
}

// Registers are given to and taken from warps; here each has as many as it names.
void decode_setmaxnreg(Decoder& d) {
  d.take_one({"inc", "dec"});
  d.take_one({"sync"});
  d.take_one({"aligned"});
  d.take_type();
  d.need_args(1, 1);
  const uint64_t count = d.integer(d.arg(0));
  if (count < 24 || count > 256 || count % 8)
    d.refuse("needs 24 to 256 registers, a multiple of 8");
  d.inst.flow = Flow::Sync;
  d.inst.run = &do_nothing;
}

// Launches follow one another completely, so that a dependent one finds all that it waits for.
void decode_griddepcontrol(Decoder& d) {
  d.take_one({"launch_dependents", "wait"});
  d.need_args(0, 0);
  d.inst.run = &do_nothing;
}

void decode_pmevent(Decoder& d) {
  d.take("mask");
  d.need_args(1, 1);
  d.integer(d.arg(0));
  d.inst.run = &do_nothing;
}

}  // namespace

const std::vector<Opcode> kSystemOpcodes = {{"nanosleep", decode_nanosleep},
                                            {"setmaxnreg", decode_setmaxnreg},
                                            {"griddepcontrol", decode_griddepcontrol},
                                            {"pmevent", decode_pmevent}};

}  // namespace ptxemu
