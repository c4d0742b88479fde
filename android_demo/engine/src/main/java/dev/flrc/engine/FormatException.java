package dev.flrc.engine;

/** A file is not what the format says (docs/format.md), or this engine does not read it. */
public final class FormatException extends FlrcException {
    public FormatException(String message, String hint) {
        super(message, hint);
    }

    public FormatException(String message) {
        super(message);
    }
}
