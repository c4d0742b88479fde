package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;

/** Reads the fields of a part of {@code tokenizer.json}; what this engine does not know is refused by name. */
final class Step {
    private final Map<?, ?> fields;
    private final String where;

    private Step(Map<?, ?> fields, String where) {
        this.fields = fields;
        this.where = where;
    }

    static Step of(Object value, String where) throws FormatException {
        if (!(value instanceof Map)) {
            throw new FormatException("tokenizer.json: " + where + " is not an object");
        }
        return new Step((Map<?, ?>) value, where);
    }

    String type() throws FormatException {
        return text("type");
    }

    String text(String name) throws FormatException {
        Object value = fields.get(name);
        if (!(value instanceof String)) {
            throw new FormatException("tokenizer.json: " + where + "." + name + " is not a string");
        }
        return (String) value;
    }

    boolean flag(String name, boolean otherwise) throws FormatException {
        Object value = fields.get(name);
        if (value == null) {
            return otherwise;
        }
        if (!(value instanceof Boolean)) {
            throw new FormatException("tokenizer.json: " + where + "." + name + " is not true or false");
        }
        return (Boolean) value;
    }

    int number(String name) throws FormatException {
        Object value = fields.get(name);
        if (!(value instanceof Long) || (Long) value < 0 || (Long) value > Integer.MAX_VALUE) {
            throw new FormatException("tokenizer.json: " + where + "." + name + " is not a count");
        }
        return ((Long) value).intValue();
    }

    boolean has(String name) {
        return fields.get(name) != null;
    }

    Step step(String name) throws FormatException {
        return of(fields.get(name), where + "." + name);
    }

    List<Step> steps(String name) throws FormatException {
        List<Step> result = new ArrayList<>();
        for (Object value : values(name)) {
            result.add(of(value, where + "." + name));
        }
        return result;
    }

    List<?> values(String name) throws FormatException {
        Object value = fields.get(name);
        if (!(value instanceof List)) {
            throw new FormatException("tokenizer.json: " + where + "." + name + " is not a list");
        }
        return (List<?>) value;
    }

    /** What a pattern says: a plain string, or null if it is a regular expression. */
    String plainPattern() throws FormatException {
        Step pattern = step("pattern");
        return pattern.has("String") ? pattern.text("String") : null;
    }

    String regexPattern() throws FormatException {
        return step("pattern").text("Regex");
    }

    FormatException unknown() throws FormatException {
        return new FormatException("tokenizer.json: " + where + " of type " + type() + " is not one this engine knows",
            "the Python runtime reads it; this engine reads the tokenizers of SmolLM2, Qwen2, Gemma 3 and llama");
    }
}
