package dev.flrc.engine;

import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.Reader;
import java.nio.charset.CodingErrorAction;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * Reads JSON strictly, value after value, so that a vocabulary of hundreds of thousands needs no tree.
 *
 * <p>Strict: UTF-8 without errors, no comments, no number that is not finite, no key twice, at most {@value #DEPTH}
 * levels. Whole numbers are {@code Long}, others {@code Double}.
 */
public final class JsonReader implements AutoCloseable {
    static final int DEPTH = 64;
    private static final int END = -1;

    private final Reader in;
    private final String where;
    private final char[] buffer = new char[1 << 14];
    private int length;
    private int position;
    private int depth;
    private boolean first = true; // of the array or object that is open

    /**
     * @param in the bytes; closed with this reader
     * @param where what errors call it
     */
    public JsonReader(InputStream in, String where) {
        this.in = new InputStreamReader(in, StandardCharsets.UTF_8.newDecoder()
            .onMalformedInput(CodingErrorAction.REPORT)
            .onUnmappableCharacter(CodingErrorAction.REPORT));
        this.where = where;
    }

    @Override
    public void close() throws IOException {
        in.close();
    }

    /** The first character of the next value: one of <code>{ [ " t f n - 0</code>…9. */
    public char peek() throws FormatException {
        int c = space();
        if (c == END) {
            throw error("it ends early");
        }
        return (char) c;
    }

    public void beginObject() throws FormatException {
        begin('{');
    }

    public void beginArray() throws FormatException {
        begin('[');
    }

    /** Whether the open array has another value, which comes next; if not, the array is closed. */
    public boolean more() throws FormatException {
        return next(']');
    }

    /** The next key of the open object; null closes the object. */
    public String name() throws FormatException {
        if (!next('}')) {
            return null;
        }
        String name = string();
        expect(':');
        return name;
    }

    public String string() throws FormatException {
        expect('"');
        StringBuilder text = new StringBuilder();
        while (true) {
            int c = read();
            if (c == '"') {
                break;
            }
            if (c == END || c < 0x20) {
                throw error("a string is not closed");
            }
            text.append(c == '\\' ? escape() : (char) c);
        }
        first = false;
        return text.toString();
    }

    public boolean bool() throws FormatException {
        String word = word();
        if (!word.equals("true") && !word.equals("false")) {
            throw error("expected true or false, found " + word);
        }
        return word.equals("true");
    }

    /** A whole number within the range of {@code int}. */
    public int integer() throws FormatException {
        String text = word();
        try {
            return Integer.parseInt(text);
        } catch (NumberFormatException e) {
            throw error("expected a whole number, found " + text);
        }
    }

    /** Reads any value: Map, List, String, Boolean, Long, Double or null. */
    public Object value() throws FormatException {
        switch (peek()) {
            case '{': {
                Map<String, Object> map = new LinkedHashMap<>();
                beginObject();
                for (String name = name(); name != null; name = name()) {
                    if (map.containsKey(name)) {
                        throw error("the key " + name + " appears twice");
                    }
                    map.put(name, value());
                }
                return map;
            }
            case '[': {
                List<Object> list = new ArrayList<>();
                beginArray();
                while (more()) {
                    list.add(value());
                }
                return list;
            }
            case '"':
                return string();
            case 't':
            case 'f':
                return bool();
            case 'n':
                if (!word().equals("null")) {
                    throw error("expected null");
                }
                return null;
            default:
                return number();
        }
    }

    /** Makes sure that nothing follows. */
    public void end() throws FormatException {
        if (space() != END) {
            throw error("something follows its end");
        }
    }

    private Object number() throws FormatException {
        String text = word();
        if (!text.matches("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")) {
            throw error("expected a value, found " + text);
        }
        try {
            if (text.matches("-?[0-9]+")) {
                return Long.parseLong(text);
            }
        } catch (NumberFormatException tooLarge) {
            throw error(text + " is out of range");
        }
        double value = Double.parseDouble(text);
        if (Double.isInfinite(value)) {
            throw error(text + " is not a finite number");
        }
        return value;
    }

    /** The letters, digits and signs that come next. */
    private String word() throws FormatException {
        space();
        StringBuilder text = new StringBuilder();
        for (int c = ahead(); isWordCharacter(c); c = ahead()) {
            text.append((char) read());
            if (text.length() > 400) {
                throw error("a number is too long");
            }
        }
        first = false;
        return text.toString();
    }

    private static boolean isWordCharacter(int c) {
        return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '+' || c == '.';
    }

    private char escape() throws FormatException {
        int c = read();
        switch (c) {
            case '"':
            case '\\':
            case '/':
                return (char) c;
            case 'b':
                return '\b';
            case 'f':
                return '\f';
            case 'n':
                return '\n';
            case 'r':
                return '\r';
            case 't':
                return '\t';
            case 'u':
                int value = 0;
                for (int i = 0; i < 4; i++) {
                    int digit = Character.digit(read(), 16);
                    if (digit < 0) {
                        throw error("a \\u needs four hexadecimal digits");
                    }
                    value = value * 16 + digit;
                }
                return (char) value;
            default:
                throw error("an unknown escape");
        }
    }

    private void begin(char open) throws FormatException {
        expect(open);
        if (++depth > DEPTH) {
            throw error("it is nested too deeply");
        }
        first = true;
    }

    private boolean next(char close) throws FormatException {
        int c = space();
        if (c == close) {
            read();
            depth--;
            first = false;
            return false;
        }
        if (!first) {
            expect(',');
        }
        first = false;
        return true;
    }

    private void expect(char wanted) throws FormatException {
        int c = space();
        if (c != wanted) {
            throw error(c == END ? "it ends early" : "expected " + wanted + ", found " + (char) c);
        }
        read();
    }

    private int space() throws FormatException {
        int c = ahead();
        while (c == ' ' || c == '\n' || c == '\r' || c == '\t') {
            read();
            c = ahead();
        }
        return c;
    }

    private int ahead() throws FormatException {
        if (position == length) {
            try {
                length = in.read(buffer, 0, buffer.length);
            } catch (IOException e) {
                throw error(e instanceof java.nio.charset.CharacterCodingException ? "it is not UTF-8" : e.getMessage());
            }
            position = 0;
            if (length <= 0) {
                length = 0;
                return END;
            }
        }
        return buffer[position];
    }

    private int read() throws FormatException {
        int c = ahead();
        if (c != END) {
            position++;
        }
        return c;
    }

    /** An error of the file that is read. */
    public FormatException error(String what) {
        return new FormatException(where + " cannot be read: " + what);
    }
}
