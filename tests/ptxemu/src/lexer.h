// Characters to words and numbers. PTX needs no token table: what a word means depends on where it
// stands.
#pragma once

#include <string>

#include "types.h"

namespace ptxemu {

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) { skip_space(); }

  bool at_end() const { return at_ >= text_.size(); }
  int line() const { return line_; }
  char peek() const { return at_end() ? '\0' : text_[at_]; }
  /// The character right after the next one; no space is skipped.
  char second() const { return at_ + 1 < text_.size() ? text_[at_ + 1] : '\0'; }

  /// Takes the character if it is next.
  bool accept(char c);
  void expect(char c);
  /// [A-Za-z_$%][A-Za-z0-9_$]*
  std::string identifier();
  /// An opcode or directive with all its modifiers: [A-Za-z0-9_.:]+
  std::string dotted();
  bool at_number() const;
  std::string quoted();
  std::string rest_of_line();
  /// Skips a bracketed group that opens here, nested ones included.
  void skip_group(char open, char close);
  /// The digits of a number: 12, 0x1f, 0f3f800000, 1.5e3, with the U of an unsigned one.
  std::string number();
  /// About what was taken last, and about what is next.
  [[noreturn]] void fail(const std::string& what) const { throw PtxError(taken_line_, what); }
  [[noreturn]] void fail_here(const std::string& what) const { throw PtxError(line_, what); }

  /// To look ahead: a place to come back to.
  struct Place {
    size_t at;
    int line;
  };
  Place place() const { return {at_, line_}; }
  void back_to(Place place) { at_ = place.at, line_ = place.line; }

 private:
  std::string found() const;
  void advance();
  void skip_space();  // and comments
  std::string run(bool (*belongs)(char));

  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
  int taken_line_ = 1;
};

}  // namespace ptxemu
