package dev.flrc.engine.tokenizer;

import dev.flrc.engine.Fields;
import dev.flrc.engine.FormatException;

/** A part of {@code tokenizer.json} that has a type; what this engine does not know is refused by name. */
final class Step {
    final Fields fields;

    private Step(Fields fields) {
        this.fields = fields;
    }

    static Step of(Object value, String where) throws FormatException {
        return new Step(Fields.of(value, "tokenizer.json: " + where));
    }

    String type() throws FormatException {
        return fields.text("type");
    }

    /** What a pattern says: a plain string, or null if it is a regular expression. */
    String plainPattern() throws FormatException {
        Fields pattern = fields.object("pattern");
        return pattern.has("String") ? pattern.text("String") : null;
    }

    String regexPattern() throws FormatException {
        return fields.object("pattern").text("Regex");
    }

    FormatException unknown() throws FormatException {
        return new FormatException(fields.where() + " of type " + type() + " is not one this engine knows",
            "the Python runtime reads it; this engine reads those of Llama, Mistral, Gemma, Qwen, SmolLM and the like");
    }
}
