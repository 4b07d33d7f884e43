// What native.h declares, as the compiler laid it out, for library.py to hold Python's declarations against.

#include <string>

#include "native.h"

namespace {

template <typename T> struct TypeName;
template <typename T> struct TypeName<T*> { static constexpr auto value = "pointer"; };
#define NAMED(TYPE, NAME) template <> struct TypeName<TYPE> { static constexpr auto value = NAME; };
NAMED(void, "void")
NAMED(bool, "bool")
NAMED(int, "int32")
NAMED(int64_t, "int64")
NAMED(uint64_t, "uint64")
NAMED(float, "float")
NAMED(double, "double")
#undef NAMED

std::string field(const char* name, size_t offset, const char* type) {
    return std::string("field ") + name + " " + std::to_string(offset) + " " + type + "\n";
}

template <typename R, typename... A> std::string function(const char* name, R (*)(A...)) {
    std::string line = std::string("function ") + name + " " + TypeName<R>::value;
    for (const char* argument : {"", TypeName<A>::value...})
        if (*argument) line += std::string(" ") + argument;
    return line + "\n";
}

std::string structs() {
    typedef LayerArgs<float> Layer;     // LayerArgs<bf16> has the same layout: all that differs is what pointers point to
    std::string text;
#define STRUCT(NAME, TYPE) text += std::string("struct " NAME " ") + std::to_string(sizeof(TYPE)) + "\n";
#define FIELD(NAME, TYPE, FIELD_) text += field(NAME "." #FIELD_, offsetof(TYPE, FIELD_), TypeName<decltype(TYPE::FIELD_)>::value);
    STRUCT("Span", Span)
    FIELD("Span", Span, row)
    FIELD("Span", Span, start)
    FIELD("Span", Span, n)
    FIELD("Span", Span, table)
    STRUCT("LayerArgs", Layer)
    FIELD("LayerArgs", Layer, attention_norm)
    FIELD("LayerArgs", Layer, wqkv)
    FIELD("LayerArgs", Layer, wo)
    FIELD("LayerArgs", Layer, ffn_norm)
    FIELD("LayerArgs", Layer, w13)
    FIELD("LayerArgs", Layer, w2)
    FIELD("LayerArgs", Layer, D)
    FIELD("LayerArgs", Layer, H)
    FIELD("LayerArgs", Layer, K)
    FIELD("LayerArgs", Layer, E)
    FIELD("LayerArgs", Layer, F)
    FIELD("LayerArgs", Layer, n_chunks)
    FIELD("LayerArgs", Layer, eps)
    FIELD("LayerArgs", Layer, communicator)
    FIELD("LayerArgs", Layer, tp)
    FIELD("LayerArgs", Layer, rank)
    FIELD("LayerArgs", Layer, fp32_sums)
    FIELD("LayerArgs", Layer, timeout_s)
    STRUCT("StepArgs", StepArgs)
    FIELD("StepArgs", StepArgs, T)
    FIELD("StepArgs", StepArgs, S)
    FIELD("StepArgs", StepArgs, cos)
    FIELD("StepArgs", StepArgs, sin)
    FIELD("StepArgs", StepArgs, blocks)
    FIELD("StepArgs", StepArgs, offsets)
    FIELD("StepArgs", StepArgs, spans)
    FIELD("StepArgs", StepArgs, n_spans)
    FIELD("StepArgs", StepArgs, tables)
    FIELD("StepArgs", StepArgs, complete)
#undef FIELD
#undef STRUCT
    return text;
}

std::string describe() {
    std::string text = structs();
#define EXPORT(NAME, TYPE) text += function(#NAME, NAME);
    FOR_EXPORTS(EXPORT)
#undef EXPORT
    text += "constant WIDTH " + std::to_string(WIDTH) + "\n";
    text += "constant MAX_RANKS " + std::to_string(MAX_PARTS) + "\n";
    return text;
}

}  // namespace

extern "C" const char* interface() {
    static const std::string text = describe();
    return text.c_str();
}
