package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.text.Normalizer.Form;
import java.util.ArrayList;
import java.util.List;

/** What is done to a text before it is split. */
interface Normalizer {
    Piece apply(Piece piece);

    static Normalizer of(Object value) throws FormatException {
        if (value == null) {
            return piece -> piece;
        }
        Step step = Step.of(value, "normalizer");
        switch (step.type()) {
            case "Sequence": {
                List<Normalizer> all = new ArrayList<>();
                for (Object part : step.fields.list("normalizers")) {
                    all.add(of(part));
                }
                return piece -> {
                    Piece result = piece;
                    for (Normalizer one : all) {
                        result = one.apply(result);
                    }
                    return result;
                };
            }
            case "Prepend": {
                String prefix = step.fields.text("prepend");
                if (prefix.isEmpty()) {
                    throw step.unknown();
                }
                return piece -> piece.prepend(prefix);
            }
            case "Replace": {
                String pattern = step.plainPattern();
                String content = step.fields.text("content");
                if (pattern == null || pattern.isEmpty()) {
                    throw step.unknown();
                }
                return piece -> piece.replace(pattern, content);
            }
            case "Strip": {
                boolean left = step.fields.flag("strip_left", true);
                boolean right = step.fields.flag("strip_right", true);
                return piece -> {
                    int end = piece.text.length();
                    int start = left ? Characters.spacesBehind(piece.text, 0) : 0;
                    return piece.part(start, right ? Math.max(start, Characters.spacesBefore(piece.text, end)) : end);
                };
            }
            case "NFC":
                return piece -> piece.map(text -> java.text.Normalizer.normalize(text, Form.NFC));
            default:
                throw step.unknown();
        }
    }
}
