package dev.flrc.engine;

import java.nio.charset.StandardCharsets;

/** The fields of a protobuf message one after the other; groups, which ONNX has none of, are refused. */
final class ProtobufReader {
    private static final int VARINT = 0;
    private static final int FIXED64 = 1;
    private static final int BYTES = 2;
    private static final int FIXED32 = 5;

    private final byte[] data;
    private final int end;
    private int at;
    private int place;
    private int begin;
    private int number;
    private boolean bytes;

    ProtobufReader(byte[] data, int begin, int end) {
        this.data = data;
        this.at = begin;
        this.end = end;
    }

    /** Goes to the next field; false at the end of the message. */
    boolean next() throws FormatException {
        if (at >= end) {
            return false;
        }
        place = at;
        long tag = varint();
        if (tag >>> 3 == 0 || tag >>> 3 > 1 << 29) {
            throw damaged();
        }
        number = (int) (tag >>> 3);
        bytes = (tag & 7) == BYTES;
        long size;
        switch ((int) (tag & 7)) {
            case VARINT:
                varint();
                size = 0;
                break;
            case BYTES:
                size = varint();
                break;
            case FIXED64:
                size = 8;
                break;
            case FIXED32:
                size = 4;
                break;
            default:
                throw damaged();
        }
        if (size < 0 || size > end - at) {
            throw damaged();
        }
        begin = at;
        at += (int) size;
        return true;
    }

    /** Where the field begins, its number included. */
    int place() {
        return place;
    }

    int number() {
        return number;
    }

    /** Whether the field is of bytes: a text or a message. */
    boolean isBytes() {
        return bytes;
    }

    ProtobufReader message() {
        return new ProtobufReader(data, begin, at);
    }

    String text() {
        return new String(data, begin, at - begin, StandardCharsets.UTF_8);
    }

    private long varint() throws FormatException {
        long value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            if (at >= end) {
                throw damaged();
            }
            byte part = data[at++];
            value |= (long) (part & 0x7F) << shift;
            if (part >= 0) {
                return value;
            }
        }
        throw damaged();
    }

    private static FormatException damaged() {
        return new FormatException("a protobuf message is damaged");
    }
}
