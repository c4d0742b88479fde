package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.text.Normalizer.Form;
import java.util.ArrayList;
import java.util.List;

/** What is done to a text before it is split. */
interface Normalizer {
    String apply(String text);

    static Normalizer of(Object value) throws FormatException {
        if (value == null) {
            return text -> text;
        }
        Step step = Step.of(value, "normalizer");
        switch (step.type()) {
            case "Sequence": {
                List<Normalizer> all = new ArrayList<>();
                for (Object part : step.fields.list("normalizers")) {
                    all.add(of(part));
                }
                return text -> {
                    String result = text;
                    for (Normalizer one : all) {
                        result = one.apply(result);
                    }
                    return result;
                };
            }
            case "Prepend": {
                String prefix = step.fields.text("prepend");
                return text -> text.isEmpty() ? text : prefix + text;
            }
            case "Replace": {
                String pattern = step.plainPattern();
                String content = step.fields.text("content");
                if (pattern == null) {
                    throw step.unknown();
                }
                return text -> text.replace(pattern, content);
            }
            case "NFC":
                return text -> java.text.Normalizer.normalize(text, Form.NFC);
            default:
                throw step.unknown();
        }
    }
}
