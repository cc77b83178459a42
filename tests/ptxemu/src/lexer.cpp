#include "lexer.h"

#include <cctype>

namespace ptxemu {
namespace {

bool in_identifier(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}
bool in_dotted(char c) { return in_identifier(c) || c == '.' || c == ':'; }
bool in_number(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '.'; }

}  // namespace

std::string Lexer::found() const { return at_end() ? "the end" : std::string("'") + peek() + "'"; }

void Lexer::advance() {
  if (text_[at_] == '\n') ++line_;
  ++at_;
}

void Lexer::skip_space() {
  taken_line_ = line_;
  while (!at_end()) {
    if (std::isspace(static_cast<unsigned char>(peek()))) {
      advance();
    } else if (peek() == '/' && second() == '/') {
      while (!at_end() && peek() != '\n') advance();
    } else if (peek() == '/' && second() == '*') {
      while (!at_end() && !(peek() == '*' && second() == '/')) advance();
      if (at_end()) fail_here("a comment does not end");
      advance(), advance();
    } else {
      return;
    }
  }
}

bool Lexer::accept(char c) {
  if (peek() != c) return false;
  advance();
  skip_space();
  return true;
}

void Lexer::expect(char c) {
  if (!accept(c)) fail_here(std::string("expected '") + c + "', found " + found());
}

std::string Lexer::run(bool (*belongs)(char)) {
  const size_t start = at_;
  while (!at_end() && belongs(peek())) advance();
  std::string word = text_.substr(start, at_ - start);
  skip_space();
  return word;
}

std::string Lexer::identifier() {
  if (!in_identifier(peek())) fail_here("expected a name, found " + found());
  return run(in_identifier);
}

std::string Lexer::dotted() { return run(in_dotted); }

bool Lexer::at_number() const { return std::isdigit(static_cast<unsigned char>(peek())) != 0; }

std::string Lexer::number() { return run(in_number); }

std::string Lexer::quoted() {
  if (peek() != '"') fail_here("expected a string");
  advance();
  std::string word;
  while (!at_end() && peek() != '"') {
    if (peek() == '\\') advance();
    word += peek();
    advance();
  }
  expect('"');
  return word;
}

std::string Lexer::rest_of_line() {
  std::string word;
  while (!at_end() && peek() != '\n') {
    word += peek();
    advance();
  }
  skip_space();
  return word;
}

void Lexer::skip_group(char open, char close) {
  expect(open);
  for (int depth = 1; depth > 0;) {
    if (at_end()) fail_here(std::string("'") + open + "' is not closed");
    if (peek() == open) ++depth;
    if (peek() == close) --depth;
    advance();
  }
  skip_space();
}

}  // namespace ptxemu
