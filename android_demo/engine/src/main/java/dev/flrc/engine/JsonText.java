package dev.flrc.engine;

import java.util.Map;

/** Writes JSON on one line: Map, Iterable, arrays of int, String, Boolean, Number and null. */
public final class JsonText {
    private JsonText() {
    }

    /**
     * @throws IllegalArgumentException a value of another class, or a number that is not finite
     */
    public static String of(Object value) {
        StringBuilder out = new StringBuilder();
        write(value, out);
        return out.toString();
    }

    private static void write(Object value, StringBuilder out) {
        if (value == null || value instanceof Boolean) {
            out.append(value);
        } else if (value instanceof Number) {
            double number = ((Number) value).doubleValue();
            if (Double.isNaN(number) || Double.isInfinite(number)) {
                throw new IllegalArgumentException(value + " is not a finite number");
            }
            out.append(value);
        } else if (value instanceof CharSequence) {
            quote((CharSequence) value, out);
        } else if (value instanceof int[]) {
            out.append('[');
            int[] numbers = (int[]) value;
            for (int i = 0; i < numbers.length; i++) {
                out.append(i == 0 ? "" : ",").append(numbers[i]);
            }
            out.append(']');
        } else if (value instanceof Iterable) {
            String comma = "";
            out.append('[');
            for (Object one : (Iterable<?>) value) {
                out.append(comma);
                write(one, out);
                comma = ",";
            }
            out.append(']');
        } else if (value instanceof Map) {
            String comma = "";
            out.append('{');
            for (Map.Entry<?, ?> entry : ((Map<?, ?>) value).entrySet()) {
                out.append(comma);
                quote((String) entry.getKey(), out);
                out.append(':');
                write(entry.getValue(), out);
                comma = ",";
            }
            out.append('}');
        } else {
            throw new IllegalArgumentException(value.getClass() + " is not JSON");
        }
    }

    private static void quote(CharSequence text, StringBuilder out) {
        out.append('"');
        for (int i = 0; i < text.length(); i++) {
            char c = text.charAt(i);
            if (c == '"' || c == '\\') {
                out.append('\\').append(c);
            } else if (c < 0x20 || c >= 0x7F && c < 0xA0 || Character.isSurrogate(c) || c == 0x2028 || c == 0x2029) {
                out.append(String.format("\\u%04x", (int) c)); // a half surrogate must not reach an encoder
            } else {
                out.append(c);
            }
        }
        out.append('"');
    }
}
