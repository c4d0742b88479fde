package dev.flrc.engine;

/** An error that a user can mend: one sentence, and a hint on what to do. */
public class FlrcException extends Exception {
    private final String hint;

    public FlrcException(String message, String hint) {
        super(message);
        this.hint = hint;
    }

    public FlrcException(String message) {
        this(message, "");
    }

    /** What to do about it; may be empty. */
    public String hint() {
        return hint;
    }
}
