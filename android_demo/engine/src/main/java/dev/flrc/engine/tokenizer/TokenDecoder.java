package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;

/** Turns tokens back into pieces of text, which are then joined. */
interface TokenDecoder {
    List<String> decode(List<String> tokens);

    static TokenDecoder of(Object value) throws FormatException {
        if (value == null) {
            return TokenDecoder::spaced;
        }
        Step step = Step.of(value, "decoder");
        switch (step.type()) {
            case "Sequence": {
                List<TokenDecoder> all = new ArrayList<>();
                for (Object part : step.fields.list("decoders")) {
                    all.add(of(part));
                }
                return tokens -> {
                    List<String> result = tokens;
                    for (TokenDecoder one : all) {
                        result = one.decode(result);
                    }
                    return result;
                };
            }
            case "ByteLevel":
                return TokenDecoder::byteLevel;
            case "Metaspace":
                return new Metaspace(step)::decode;
            case "ByteFallback":
                return TokenDecoder::byteFallback;
            case "Fuse":
                return tokens -> Collections.singletonList(String.join("", tokens));
            case "Replace": {
                String pattern = step.plainPattern();
                String content = step.fields.text("content");
                if (pattern == null || pattern.isEmpty()) {
                    throw step.unknown();
                }
                return tokens -> {
                    List<String> result = new ArrayList<>();
                    for (String token : tokens) {
                        result.add(token.replace(pattern, content));
                    }
                    return result;
                };
            }
            case "Strip": {
                String content = step.fields.text("content");
                int start = step.fields.count("start", 0);
                int stop = step.fields.count("stop", 0);
                return tokens -> {
                    List<String> result = new ArrayList<>();
                    for (String token : tokens) {
                        result.add(strip(token, content, start, stop));
                    }
                    return result;
                };
            }
            default:
                throw step.unknown();
        }
    }

    /** What the tokenizers library does without a decoder: a space between two tokens. */
    static List<String> spaced(List<String> tokens) {
        return Collections.singletonList(String.join(" ", tokens));
    }

    static List<String> byteLevel(List<String> tokens) {
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        for (String token : tokens) {
            ByteArrayOutputStream own = new ByteArrayOutputStream();
            boolean known = true;
            for (int i = 0; i < token.length() && known; i++) {
                int b = ByteAlphabet.byteOf(token.charAt(i));
                known = b >= 0;
                own.write(b);
            }
            byte[] written = known ? own.toByteArray() : token.getBytes(StandardCharsets.UTF_8);
            bytes.write(written, 0, written.length);
        }
        return Collections.singletonList(new String(bytes.toByteArray(), StandardCharsets.UTF_8));
    }

    /** Joins runs of byte tokens; every byte of a run that is not UTF-8 becomes U+FFFD. */
    static List<String> byteFallback(List<String> tokens) {
        List<String> result = new ArrayList<>();
        ByteArrayOutputStream run = new ByteArrayOutputStream();
        for (String token : tokens) {
            int b = byteToken(token);
            if (b >= 0) {
                run.write(b);
                continue;
            }
            flush(run, result);
            result.add(token);
        }
        flush(run, result);
        return result;
    }

    static void flush(ByteArrayOutputStream run, List<String> result) {
        if (run.size() == 0) {
            return;
        }
        byte[] bytes = run.toByteArray();
        run.reset();
        try {
            result.add(StandardCharsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString());
        } catch (CharacterCodingException e) {
            for (int i = 0; i < bytes.length; i++) {
                result.add("\uFFFD");
            }
        }
    }

    /** The byte of a token such as {@code <0x0A>}, or -1. */
    static int byteToken(String token) {
        if (token.length() != 6 || !token.startsWith("<0x") || !token.endsWith(">")) {
            return -1;
        }
        int high = "0123456789abcdef".indexOf(Character.toLowerCase(token.charAt(3)));
        int low = "0123456789abcdef".indexOf(Character.toLowerCase(token.charAt(4)));
        return high < 0 || low < 0 ? -1 : high * 16 + low;
    }

    static String strip(String token, String content, int start, int stop) {
        int from = 0;
        int to = token.length();
        for (int i = 0; i < start && token.startsWith(content, from) && from < to; i++) {
            from += content.length();
        }
        for (int i = 0; i < stop && to - content.length() >= from && token.endsWith(content); i++) {
            to -= content.length();
            token = token.substring(0, to);
        }
        return token.substring(from, to);
    }
}
