package dev.flrc.engine;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** The fields of a JSON object; every error names the place. */
public final class Fields {
    private final Map<?, ?> values;
    private final String where;

    private Fields(Map<?, ?> values, String where) {
        this.values = values;
        this.where = where;
    }

    public static Fields of(Object value, String where) throws FormatException {
        if (!(value instanceof Map)) {
            throw new FormatException(where + ": expected an object");
        }
        return new Fields((Map<?, ?>) value, where);
    }

    /** What errors call the object. */
    public String where() {
        return where;
    }

    /** Refuses fields of any other name. */
    public void only(String... names) throws FormatException {
        for (Object key : values.keySet()) {
            if (!Arrays.asList(names).contains(key)) {
                throw new FormatException(where + ": unknown field '" + key + "'");
            }
        }
    }

    public boolean has(String name) {
        return values.get(name) != null;
    }

    public String text(String name) throws FormatException {
        Object value = values.get(name);
        if (!(value instanceof String)) {
            throw wrong(name, "a string");
        }
        return (String) value;
    }

    /** Whether a flag is set; {@code otherwise} if it is not there. */
    public boolean flag(String name, boolean otherwise) throws FormatException {
        Object value = values.get(name);
        if (value == null) {
            return otherwise;
        }
        if (!(value instanceof Boolean)) {
            throw wrong(name, "true or false");
        }
        return (Boolean) value;
    }

    public long whole(String name, long least, long most) throws FormatException {
        Object value = values.get(name);
        if (!(value instanceof Long) || (Long) value < least || (Long) value > most) {
            throw wrong(name, "a whole number from " + least + " to " + most);
        }
        return (Long) value;
    }

    public int count(String name, int least) throws FormatException {
        return (int) whole(name, least, Integer.MAX_VALUE);
    }

    /** The same; {@code otherwise} if the field is not there. */
    public int count(String name, int least, int otherwise) throws FormatException {
        return values.containsKey(name) ? count(name, least) : otherwise;
    }

    public double real(String name) throws FormatException {
        Object value = values.get(name);
        if (!(value instanceof Number)) {
            throw wrong(name, "a number");
        }
        return ((Number) value).doubleValue();
    }

    public double[] reals(String name) throws FormatException {
        List<?> list = list(name);
        double[] result = new double[list.size()];
        for (int i = 0; i < result.length; i++) {
            if (!(list.get(i) instanceof Number)) {
                throw wrong(name, "a list of numbers");
            }
            result[i] = ((Number) list.get(i)).doubleValue();
        }
        return result;
    }

    public int[] counts(String name, int least) throws FormatException {
        List<?> list = list(name);
        int[] result = new int[list.size()];
        for (int i = 0; i < result.length; i++) {
            Object value = list.get(i);
            if (!(value instanceof Long) || (Long) value < least || (Long) value > Integer.MAX_VALUE) {
                throw wrong(name, "a list of whole numbers of at least " + least);
            }
            result[i] = ((Long) value).intValue();
        }
        return result;
    }

    public Fields object(String name) throws FormatException {
        return of(values.get(name), where + "." + name);
    }

    public List<Fields> objects(String name) throws FormatException {
        List<Fields> result = new ArrayList<>();
        for (Object value : list(name)) {
            result.add(of(value, where + "." + name));
        }
        return result;
    }

    /** The objects of an object, by name. */
    public Map<String, Fields> named() throws FormatException {
        Map<String, Fields> result = new LinkedHashMap<>();
        for (Map.Entry<?, ?> entry : values.entrySet()) {
            result.put((String) entry.getKey(), of(entry.getValue(), where + "[" + entry.getKey() + "]"));
        }
        return result;
    }

    public List<?> list(String name) throws FormatException {
        Object value = values.get(name);
        if (!(value instanceof List)) {
            throw wrong(name, "a list");
        }
        return (List<?>) value;
    }

    private FormatException wrong(String name, String expected) {
        return new FormatException(where + "." + name + ": expected " + expected);
    }
}
